"""The tasks: the 20 of Gao et al. 2025, Table 1, three more about Python, six mostly about English.

The templates are ours; the paper released none. One change separates the two sides of a pair. Where it can,
it puts one token in another's place, because an edit patches a prompt with its counterfactual token by
token. Where the contrast itself needs more, a few are inserted or exchanged: `if_equals` (a statement or
none), `with_as`, `lambda_func` and `var_if` (an assignment in the place of a keyword), `if_ternary` (a new
line), `final_kwarg` (a default), `bracket_counting` (a bracket), `enumerate_range` (a variable),
`fstring_brace` (a prefix), `class_init` (a name of several tokens), `docstring_argument` (two names change
places).
"""

from extractor import task_prose, task_quotes, task_statements, task_variables
from extractor.task_text import TaskSpec

PAPER_TASKS = (
    "single_double_quote", "final_kwarg", "set_or_string", "set_or_string_fixedvarname", "class_init",
    "with_as", "bracket_brace", "with_open", "bracket_counting", "for_while", "else_elif", "fstring_brace",
    "if_ternary", "var_swap", "indent_for", "lambda_func", "if_equals", "enumerate_range", "var_if",
    "while_return_true",
)  # fmt: skip
"""Names and order of the paper's table."""

_PYTHON = task_quotes.TASKS | task_statements.TASKS | task_variables.TASKS
_PAPER = {name: _PYTHON[name] for name in PAPER_TASKS}

TASKS: dict[str, TaskSpec] = _PAPER | _PYTHON | task_prose.TASKS
