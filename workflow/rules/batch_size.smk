rule batch_size_plan:
    """The batch size of a trained stage, measured on the hardware that will train it."""
    input:
        config="<results>/config/batch_size_{stage}.json",
    output:
        plan="<results>/batch_size/{stage}.json",
    log:
        "<results>/batch_size/{stage}.log",
    conda:
        "../../environment.yml"
    threads: 16
    resources:
        gpu=lambda wildcards: min(1, getattr(run.train, wildcards.stage).gpus),
    shell:
        "nanochat batch_size --config {input.config} --out {output.plan} > {log} 2>&1"


rule batch_size:
    """The plans of all three stages."""
    input:
        expand("<results>/batch_size/{stage}.json", stage=TRAINED_STAGES),
