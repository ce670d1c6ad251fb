"""Tables of text as Markdown, CSV and LaTeX."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

# What LaTeX reads as more than the character.
LATEX = {each: f"\\{each}" for each in "&%$#_{}"} | {
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "→": r"$\rightarrow$", "<": r"$<$", ">": r"$>$", "≥": r"$\geq$", "\N{MINUS SIGN}": "$-$"},
}


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        title: What it shows, one line.
        headings: Of its columns.
        rows: As many cells each as there are headings.
        notes: Sentences below it.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def markdown(self) -> str:
        """Write the title in bold, the table and the notes."""
        body = "\n".join(markdown([self.headings, *self.rows]))
        return "\n\n".join([f"**{self.title}**", body, *self.notes]) + "\n"

    def csv(self) -> str:
        """Write headings and rows alone, with the minus sign that programs read."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headings, *self.rows])
        return text.getvalue().replace("\N{MINUS SIGN}", "-")

    def latex(self) -> str:
        """Write a floating table with the rules of `booktabs`; the first column is left-aligned, others centred."""
        heads, *rows = [" & ".join(map(latex, line)) + r" \\" for line in (self.headings, *self.rows)]
        lines = [
            r"\begin{table}[t]",
            r"  \centering",
            f"  \\caption{{{latex('. '.join([self.title, ' '.join(self.notes)]).removesuffix('. '))}}}",
            f"  \\begin{{tabular}}{{l{'c' * (len(self.headings) - 1)}}}",
            *(f"    {line}" for line in (r"\toprule", heads, r"\midrule", *rows, r"\bottomrule")),
            r"  \end{tabular}",
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"


def markdown(cells: Sequence[Sequence[str]]) -> list[str]:
    """Write a table in Markdown, headings first, its columns aligned for terminals."""
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    widths = [max(3, *map(len, column)) for column in zip(*escaped, strict=True)]
    widths[-1] = max(3, len(escaped[0][-1]))  # reasons may be long
    lines = [escaped[0], ["-" * width for width in widths], *escaped[1:]]
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines]


def latex(text: str) -> str:
    """Escape a text for LaTeX."""
    return re.sub("|".join(map(re.escape, LATEX)), lambda found: LATEX[found[0]], text)
