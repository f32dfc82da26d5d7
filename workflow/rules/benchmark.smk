rule run_benchmark:
    """One optimisation, before and after, on the hardware of the run."""
    input:
        config="<results>/config/benchmark.json",
        plan="<results>/batch_size/base.json",
        model="<results>/base/model.safetensors",
        conversations="<results>/conversations/sft/metrics.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        rows=report(
            "<results>/benchmark/{benchmark}.json",
            caption="../report/benchmark.rst",
            category="Benchmarks",
        ),
    log:
        "<results>/benchmark/{benchmark}.log",
    conda:
        "../../environment.yml"
    threads: 16
    resources:
        gpu=run.benchmark.gpus,
    params:
        folder=subpath(output.rows, parent=True),
        model=subpath(input.model, parent=True),
        conversations=subpath(input.conversations, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat benchmark {wildcards.benchmark} --config {input.config} --plan {input.plan} --model {params.model}"
        " --tokenizer {params.tokenizer} --conversations {params.conversations} --out {params.folder} > {log} 2>&1"


rule benchmark:
    """All benchmarks that the settings name."""
    input:
        expand("<results>/benchmark/{benchmark}.json", benchmark=run.benchmark.names),
