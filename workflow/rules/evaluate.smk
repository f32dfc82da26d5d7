rule evaluate_stage:
    """Scores of a trained stage on held-out text and tasks, each beside chance."""
    input:
        config="<results>/config/evaluate.json",
        model="<results>/{stage}/model.safetensors",
        manifest="<results>/corpus/manifest.json",
        tokens="<results>/tokens/metrics.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        scores=report(
            "<results>/evaluate/{stage}.json",
            caption="../report/evaluate.rst",
            category="Scores",
        ),
    log:
        "<results>/evaluate/{stage}.log",
    conda:
        "../../environment.yml"
    threads: 16
    resources:
        gpu=run.evaluate.gpus,
    params:
        model=subpath(input.model, parent=True),
        corpus=subpath(input.manifest, parent=True),
        tokens=subpath(input.tokens, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat evaluate --config {input.config} --model {params.model} --tokenizer {params.tokenizer}"
        " --corpus {params.corpus} --tokens {params.tokens} --out {output.scores} > {log} 2>&1"


rule evaluate:
    """The scores of all three stages."""
    input:
        expand("<results>/evaluate/{stage}.json", stage=TRAINED_STAGES),
