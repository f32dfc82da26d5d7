rule corpus:
    """Raw text to shards of a bounded size; the validation shards share no document with the others."""
    input:
        config="<results>/config/corpus.json",
        texts=own_texts,
    output:
        manifest="<results>/corpus/manifest.json",
    log:
        "<results>/corpus/corpus.log",
    conda:
        "../../environment.yml"
    threads: 8
    params:
        folder=subpath(output.manifest, parent=True),
    shell:
        "nanochat corpus --config {input.config} --out {params.folder} > {log} 2>&1"


rule make_conversations:
    """The conversations of mid or sft, made and encoded."""
    input:
        config="<results>/config/conversations_{stage}.json",
        own=own_conversations,
        manifest="<results>/corpus/manifest.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        metrics="<results>/conversations/{stage}/metrics.json",
    log:
        "<results>/conversations/{stage}/conversations.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        folder=subpath(output.metrics, parent=True),
        corpus=subpath(input.manifest, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat conversations --config {input.config} --corpus {params.corpus} --tokenizer {params.tokenizer}"
        " --out {params.folder} > {log} 2>&1"


rule conversations:
    """The conversations of both."""
    input:
        expand("<results>/conversations/{stage}/metrics.json", stage=("mid", "sft")),
