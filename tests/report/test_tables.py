from codistill.report.tables import Table

TABLE = Table("100 % of r_1", ["run", "error"], [["a|b_c", "1.0 ± 0.1"], ["d, e", ""]], ["A note & more."])


def test_markdown_is_aligned_and_escapes_bars():
    assert TABLE.markdown() == (
        "**100 % of r_1**\n"
        "\n"
        "| run    | error |\n"
        "| ------ | ----- |\n"
        "| a\\|b_c | 1.0 ± 0.1 |\n"
        "| d, e   |       |\n"
        "\n"
        "A note & more.\n"
    )


def test_csv_has_headings_and_rows():
    assert TABLE.csv() == 'run,error\na|b_c,1.0 ± 0.1\n"d, e",\n'


def test_latex_escapes_what_it_would_read_as_commands():
    assert TABLE.latex() == (
        "\\begin{table}[t]\n"
        "  \\centering\n"
        "  \\caption{100 \\% of r\\_1. A note \\& more.}\n"
        "  \\begin{tabular}{lc}\n"
        "    \\toprule\n"
        "    run & error \\\\\n"
        "    \\midrule\n"
        "    a|b\\_c & 1.0 $\\pm$ 0.1 \\\\\n"
        "    d, e &  \\\\\n"
        "    \\bottomrule\n"
        "  \\end{tabular}\n"
        "\\end{table}\n"
    )
    assert Table("\\~^", ["{}"], [["$<"]]).latex().count("\\textbackslash{}\\textasciitilde{}\\textasciicircum{}") == 1
