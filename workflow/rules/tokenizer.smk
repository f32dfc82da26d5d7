rule tokenizer:
    """Byte-level BPE, trained on the corpus."""
    input:
        config="<results>/config/tokenizer.json",
        manifest="<results>/corpus/manifest.json",
    output:
        tokenizer="<results>/tokenizer/tokenizer.json",
        metrics="<results>/tokenizer/metrics.json",
    log:
        "<results>/tokenizer/tokenizer.log",
    conda:
        "../../environment.yml"
    threads: 16
    params:
        folder=subpath(output.tokenizer, parent=True),
        corpus=subpath(input.manifest, parent=True),
    shell:
        "nanochat tokenizer --config {input.config} --corpus {params.corpus} --out {params.folder} > {log} 2>&1"


rule tokens:
    """The corpus encoded once, on CPUs, so that no GPU hour pays for it."""
    input:
        config="<results>/config/tokens.json",
        manifest="<results>/corpus/manifest.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        metrics="<results>/tokens/metrics.json",
    log:
        "<results>/tokens/tokens.log",
    conda:
        "../../environment.yml"
    threads: 16
    params:
        folder=subpath(output.metrics, parent=True),
        corpus=subpath(input.manifest, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat tokens --config {input.config} --corpus {params.corpus} --tokenizer {params.tokenizer}"
        " --out {params.folder} > {log} 2>&1"
