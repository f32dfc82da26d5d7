# Checkpoints and log.jsonl are no outputs: Snakemake deletes declared outputs at each attempt, and a killed or requeued
# job must go on from its newest valid checkpoint.
#
# A newer plan trains a finished stage again although it decides only how fast: with `ancient` Snakemake (9.27) passes over a stage
# without outputs too, where its plan is made anew in the same run.


rule base:
    """Pretraining."""
    input:
        config="<results>/config/base.json",
        plan="<results>/batch_size/base.json",
        tokens="<results>/tokens/metrics.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        model="<results>/base/model.safetensors",
        config="<results>/base/config.json",
        metrics=report(
            "<results>/base/metrics.json",
            caption="../report/training.rst",
            category="Training",
        ),
    log:
        "<results>/base/base.log",
    conda:
        "../../environment.yml"
    threads: threads_of(run.train.base)
    resources:
        gpu=run.train.base.gpus,
        nodes=run.train.base.nodes,
    params:
        folder=subpath(output.model, parent=True),
        tokens=subpath(input.tokens, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat-launch --gpus {resources.gpu} nanochat base --config {input.config} --plan {input.plan}"
        " --tokens {params.tokens} --tokenizer {params.tokenizer} --checkpoints {params.folder}/checkpoints"
        " --out {params.folder} > {log} 2>&1"


rule mid:
    """Midtraining: the chat format, multiple choice and tool use, from the base model."""
    input:
        config="<results>/config/mid.json",
        plan="<results>/batch_size/mid.json",
        model="<results>/base/model.safetensors",
        conversations="<results>/conversations/mid/metrics.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        model="<results>/mid/model.safetensors",
        config="<results>/mid/config.json",
        metrics=report(
            "<results>/mid/metrics.json",
            caption="../report/training.rst",
            category="Training",
        ),
    log:
        "<results>/mid/mid.log",
    conda:
        "../../environment.yml"
    threads: threads_of(run.train.mid)
    resources:
        gpu=run.train.mid.gpus,
        nodes=run.train.mid.nodes,
    params:
        folder=subpath(output.model, parent=True),
        model=subpath(input.model, parent=True),
        conversations=subpath(input.conversations, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat-launch --gpus {resources.gpu} nanochat mid --config {input.config} --plan {input.plan}"
        " --model {params.model} --conversations {params.conversations} --tokenizer {params.tokenizer}"
        " --checkpoints {params.folder}/checkpoints --out {params.folder} > {log} 2>&1"


rule sft:
    """Supervised finetuning on conversations, from the midtrained model."""
    input:
        config="<results>/config/sft.json",
        plan="<results>/batch_size/sft.json",
        model="<results>/mid/model.safetensors",
        conversations="<results>/conversations/sft/metrics.json",
        tokenizer="<results>/tokenizer/tokenizer.json",
    output:
        model="<results>/sft/model.safetensors",
        config="<results>/sft/config.json",
        metrics=report(
            "<results>/sft/metrics.json",
            caption="../report/training.rst",
            category="Training",
        ),
    log:
        "<results>/sft/sft.log",
    conda:
        "../../environment.yml"
    threads: threads_of(run.train.sft)
    resources:
        gpu=run.train.sft.gpus,
        nodes=run.train.sft.nodes,
    params:
        folder=subpath(output.model, parent=True),
        model=subpath(input.model, parent=True),
        conversations=subpath(input.conversations, parent=True),
        tokenizer=subpath(input.tokenizer, parent=True),
    shell:
        "nanochat-launch --gpus {resources.gpu} nanochat sft --config {input.config} --plan {input.plan}"
        " --model {params.model} --conversations {params.conversations} --tokenizer {params.tokenizer}"
        " --checkpoints {params.folder}/checkpoints --out {params.folder} > {log} 2>&1"
