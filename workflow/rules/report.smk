rule report:
    """What ran, on what, how long, how well, and what it cost."""
    input:
        rules.evaluate.input,
        rules.benchmark.input,
        rules.batch_size.input,
        config="<results>/config/report.json",
        metrics=expand("<results>/{stage}/metrics.json", stage=TRAINED_STAGES),
    output:
        page=report(
            "<results>/report.md",
            caption="../report/report.rst",
            category="Report",
        ),
        numbers="<results>/report.json",
        figures=report(
            directory("<results>/figures"),
            patterns=["{figure}.png"],
            caption="../report/figure.rst",
            category="Figures",
        ),
    log:
        "<results>/report.log",
    conda:
        "../../environment.yml"
    threads: 1
    params:
        folder=subpath(output.page, parent=True),
    shell:
        "nanochat report --config {input.config} --results {params.folder} > {log} 2>&1"
