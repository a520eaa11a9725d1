"""The Python tasks as data: minimal pairs of prompts whose next token differs.

After Gao et al. 2025, Table 1 (the templates are ours; the paper released none). A template is
(clean, corrupted, answer, distractor); `{slots}` are filled from the pools below, the same on both sides.
Of every list the first part (before `HELD_OUT`) is for training, the rest for held-out prompts, and the
pools are split likewise, so held-out prompts differ by template and by content.

Slots: f function, x y z variables, a b attributes, w v words in strings, n m numbers, i loop variable, e file
variable, t indentation of the line.
"""

HELD_OUT = "held out from here"

Template = tuple[str, str, str, str]

SLOTS: dict[str, tuple[str, ...]] = {
    "f": (
        "process", "load", "parse", "update", "get_value", "check", "build", "run", "convert", "read",
        HELD_OUT, "handle", "create", "validate", "find", "render", "write", "merge",
    ),
    "x": (
        "data", "value", "result", "name", "items", "path", "key", "text", "line", "args", "node", "obj",
        HELD_OUT, "content", "config", "values", "func", "output", "target", "response", "params",
    ),
    "y": (
        "other", "source", "index", "options", "parent", "mode", "cls", "size", "kwargs", "dtype",
        HELD_OUT, "context", "default", "start", "message", "count", "prefix", "input",
    ),
    "z": ("seen", "out", "total", "names", HELD_OUT, "found", "parts", "keys"),
    "a": (
        "name", "size", "type", "data", "path", "shape", "value", "key", "parent", "mode",
        HELD_OUT, "index", "args", "options", "state", "code", "text",
    ),
    "w": (
        "error", "name", "type", "value", "path", "default", "test", "data", "key", "start",
        HELD_OUT, "mode", "size", "file", "input", "index", "output", "message",
    ),
    "v": (
        "version", "user", "text", "format", "method", "class", "module", "string", "number",
        HELD_OUT, "result", "function", "object", "code", "group", "state",
    ),
    "n": ("1", "2", "3", "5", "8", HELD_OUT, "0", "4", "6"),
    "m": ("10", "7", "12", "20", HELD_OUT, "16", "9", "32"),
    "i": ("i", "item", "p", "k", HELD_OUT, "j", "n", "x"),
    "e": ("f", "fp", "file", HELD_OUT, "fh", "stream"),
}  # fmt: skip

# What stands before the line in question; the same on both sides.
PREAMBLES: tuple[str, ...] = (
    'def {f}({x}, {y}=None):\n    """Return the {w} of the {v}."""\n',
    "def {f}(self, {x}, {y}):\n    if {y} is None:\n        return {x}\n",
    "class {f}Error(Exception):\n    pass\n\n\ndef {f}({x}, {y}):\n",
    "    {y} = {x}.{a}\n\n    def {f}(self, {x}):\n",
    "from {w} import {f}\n\n\ndef {f}_{w}({x}, {y}={n}):\n",
    "def {f}({x}):\n    {y} = {x}.{a}\n    if {y} > {n}:\n        {y} = {n}\n",
    HELD_OUT,
    "def {f}({y}, {x}):\n    # the {w} of {v}\n    {y} = {y}.{a}\n",
    "def {f}(self, {x}={n}):\n    {y} = self.{a}({x})\n",
    "@{w}\ndef {f}({x}, {y}):\n    if not {y}:\n        raise ValueError({x})\n",
    "import {w}\n\n\ndef {f}({x}, {y}=True):\n    {y} = {x} + {n}\n",
)  # fmt: skip

TASKS: dict[str, tuple[Template | str, ...]] = {
    "single_double_quote": (
        ("    print('{w}", '    print("{w}', "')", '")'),
        ("    {x}.{f}('{w} {v}", '    {x}.{f}("{w} {v}', "')", '")'),
        ("    return {f}('{v}", '    return {f}("{v}', "')", '")'),
        ("    raise ValueError('{w} {v}", '    raise ValueError("{w} {v}', "')", '")'),
        HELD_OUT,
        ("    {y} = {f}('{w}", '    {y} = {f}("{w}', "')", '")'),
        ("    self.{a}('{v} {w}", '    self.{a}("{v} {w}', "')", '")'),
        ("    raise TypeError('{v}", '    raise TypeError("{v}', "')", '")'),
    ),
    "bracket_paren": (
        ("    {y} = {x}[{i}", "    {y} = {x}({i}", "]", ")"),
        ("    return {x}[{y}.{a}", "    return {x}({y}.{a}", "]", ")"),
        ("    {y} = self.{a}[{x}", "    {y} = self.{a}({x}", "]", ")"),
        HELD_OUT,
        ("    {x} = {y}.{a}[{x}", "    {x} = {y}.{a}({x}", "]", ")"),
        ("    return self.{a}[{y}", "    return self.{a}({y}", "]", ")"),
    ),
    "if_equals": (
        ("    if {x}", "    {x}", " ==", " ="),
        ("    if {x}.{a}", "    {x}.{a}", " ==", " ="),
        ("        if {y}", "        {y}", " ==", " ="),
        HELD_OUT,
        ("        if {x}.{a}", "        {x}.{a}", " ==", " ="),
        ("    if self.{a}", "    self.{a}", " ==", " ="),
    ),
    "with_as": (
        ("    with open({x})", "    {y} = open({x})", " as", "\n   "),
        ("    with {x}.{f}({y})", "    {e} = {x}.{f}({y})", " as", "\n   "),
        ("    with open({x}, '{w}')", "    {e} = open({x}, '{w}')", " as", "\n   "),
        HELD_OUT,
        ("    with {f}({x})", "    {y} = {f}({x})", " as", "\n   "),
        ("    with self.{f}({y})", "    {x} = self.{f}({y})", " as", "\n   "),
    ),
    "lambda_func": (
        ("    {y} = lambda {x}", "    def {x}", ":", "("),
        ("    {f} = lambda {y}", "    def {y}", ":", "("),
        HELD_OUT,
        ("    {a} = lambda {x}", "    def {x}", ":", "("),
        ("    self.{a} = lambda {y}", "    async def {y}", ":", "("),
    ),
    "bracket_brace": (
        ("    {y} = {{'{w}': {n}, '{v}", "    {y} = ['{w}', {n}, '{v}", "':", "',"),
        ("    return {{'{w}': {x}, '{v}", "    return ['{w}', {x}, '{v}", "':", "',"),
        HELD_OUT,
        ("    {x} = {{'{v}': {y}, '{w}", "    {x} = ['{v}', {y}, '{w}", "':", "',"),
        ("    self.{a} = {{'{w}': {n}, '{v}", "    self.{a} = ['{w}', {n}, '{v}", "':", "',"),
    ),
    "bracket_counting": (
        ("    {y} = [[{n}, {m}], [{n}, {m}", "    {y} = [{n}, {m}, {n}, {m}", "]]", "]"),
        ("    return [[{x}, {y}], [{y}, {x}", "    return [{x}, {y}, {y}, {x}", "]]", "]"),
        HELD_OUT,
        ("    {x} = [[{m}, {n}], [{m}, {n}", "    {x} = [{m}, {n}, {m}, {n}", "]]", "]"),
        ("    self.{a} = [[{x}, {n}], [{y}, {m}", "    self.{a} = [{x}, {n}, {y}, {m}", "]]", "]"),
    ),
    "for_while": (
        ("    for {i}", "    while {i}", " in", ":"),
        ("    for {x}", "    while {x}", " in", ":"),
        ("        for {y}", "        while {y}", " in", ":"),
        HELD_OUT,
        ("        for {x}", "        while {x}", " in", ":"),
        ("    for {y}", "    while {y}", " in", ":"),
    ),
    "else_elif": (
        ("        {x} = {n}\n    else", "        {x} = {n}\n    elif", ":", " self"),
        ("        return {y}\n    else", "        return {y}\n    elif", ":", " self"),
        HELD_OUT,
        ("        {y} = {x}\n    else", "        {y} = {x}\n    elif", ":", " self"),
        ("        {x}.{f}({y})\n    else", "        {x}.{f}({y})\n    elif", ":", " self"),
    ),
    "if_ternary": (
        ("    if {x}", "    {y} = {a} if {x}", ":", " else"),
        ("    if {x}.{a}", "    return {y} if {x}.{a}", ":", " else"),
        HELD_OUT,
        ("    if {y}", "    {x} = {w} if {y}", ":", " else"),
        ("    if {y}.{a}", "    return {x} if {y}.{a}", ":", " else"),
    ),
    "if_return": (
        ("    if {x} is None", "    return {x} is None", ":", "\n\n"),
        ("    if {x}.{a} is None", "    return {x}.{a} is None", ":", "\n\n"),
        HELD_OUT,
        ("    if {y} is None", "    return {y} is None", ":", "\n\n"),
        ("    if self.{a} is None", "    return self.{a} is None", ":", "\n\n"),
    ),
    "var_swap": (
        ("    {x}, {y} = {y},", "    {y}, {x} = {x},", " {x}", " {y}"),
        ("        {x}, {y} = {y},", "        {y}, {x} = {x},", " {x}", " {y}"),
        HELD_OUT,
        ("    {y}, {x} = {x},", "    {x}, {y} = {y},", " {y}", " {x}"),
    ),
    "indent_for": (
        (
            "        for {i} in {x}:", "    for {i} in {x}:",
            "\n           ", "\n       ",
        ),
        (
            "        for {i} in {x}.{a}:", "    for {i} in {x}.{a}:",
            "\n           ", "\n       ",
        ),
        HELD_OUT,
        (
            "        for {i} in {y}:", "    for {i} in {y}:",
            "\n           ", "\n       ",
        ),
        (
            "        for {i} in self.{a}:", "    for {i} in self.{a}:",
            "\n           ", "\n       ",
        ),
    ),
    "zip_range": (
        ("    for {i}, {x} in", "    for {i} in", " zip", " range"),
        ("        for {i}, {y} in", "        for {i} in", " zip", " range"),
        HELD_OUT,
        ("        for {i}, {x} in", "        for {i} in", " zip", " range"),
        ("    for {i}, {y} in", "    for {i} in", " zip", " range"),
    ),
    "set_or_string": (
        (
            "    {z} = set()\n    for {i} in {x}:\n        {z}",
            '    {z} = ""\n    for {i} in {x}:\n        {z}',
            ".", " +=",
        ),
        (
            "    {z} = set()\n    while {x}:\n        {z}",
            '    {z} = ""\n    while {x}:\n        {z}',
            ".", " +=",
        ),
        HELD_OUT,
        (
            "    {z} = set()\n    for {i} in {y}.{a}:\n        {z}",
            '    {z} = ""\n    for {i} in {y}.{a}:\n        {z}',
            ".", " +=",
        ),
    ),
    "class_init": (
        (
            "    def __init__(self, {x}, {y}):\n        self.{x} =",
            "    def __init__(self, {x}, {y}):\n        self.{y} =",
            " {x}", " {y}",
        ),
        HELD_OUT,
        (
            "    def __init__(self, {y}, {x}={n}):\n        self.{x} =",
            "    def __init__(self, {y}, {x}={n}):\n        self.{y} =",
            " {x}", " {y}",
        ),
    ),
    "while_return_true": (
        ("    while True", "    return True", ":", "\n\n"),
        ("        while True", "        return True", ":", "\n\n"),
        HELD_OUT,
        ("    while {n}", "    return {n}", ":", "\n\n"),
    ),
    "final_kwarg": (
        ("    def {f}({x}=None, {y}", "    def {f}({x}, {y}", "=", "):"),
        ("    def {f}(self, {x}=None, {y}", "    def {f}(self, {x}, {y}", "=", "):"),
        HELD_OUT,
        ("    def {f}({y}=None, {x}", "    def {f}({y}, {x}", "=", "):"),
        ("    def {f}(self, {y}=None, {x}", "    def {f}(self, {y}, {x}", "=", "):"),
    ),
}  # fmt: skip
