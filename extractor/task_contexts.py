"""What stands around the place where a prompt's choice is made: code of the corpus' kind, and prose.

`<here>` marks where a template goes; it is indented like the mark. The same text stands on both sides of a
pair. Each split has surroundings of its own.
"""

from extractor.task_words import TaskSplit

# Before a function of a module.
MODULES: dict[TaskSplit, tuple[str, ...]] = {
    "train": (
        "import $M\nfrom $N import $g\n\n\n",
        "import $M\n\n$D = $M.$g($n)\n\n\n",
        "from .$u import $D\n\n\nclass ${D}Error(Exception):\n    pass\n\n\n",
        'def $g($t):\n    """Return the $u of a $t."""\n    return $t.$u\n\n\n',
        "def $g($t, $u=None):\n    if not $t:\n        return $u\n    return $t[0]\n\n\n",
    ),
    "selection": (
        "from $M import $g, $D\n\nlogger = $N.$D(__name__)\n\n\n",
        "class $D:\n    $u = $n\n\n\n",
        "def $g($t):\n    # see $u\n    return $D($t)\n\n\n",
    ),
    "held_out": (
        "import $M, $N\n\n__all__ = ['$g', '$f']\n\n",
        "class $D(object):\n    def $g(self):\n        return self.$t\n\n\n",
        "@$M.$g\ndef $h($t):\n    $u = $t + $n\n    return $u\n\n\n",
        "_$t = {}\n_$u = None\n\n",
    ),
}

# Before a method of a class.
CLASSES: dict[TaskSplit, tuple[str, ...]] = {
    "train": (
        'class $C($D):\n    """A $C with a $u."""\n\n',
        "class $C:\n    def __init__(self, $t, $u):\n        self.$t = $t\n        self.$u = $u\n\n",
        "class $C(object):\n    $t = None\n\n    def $g(self):\n        return self.$t\n\n",
        "import $M\n\n\nclass $C($M.$D):\n    $u = $n\n\n",
    ),
    "selection": (
        "class $C($D):\n    # $u of the $t\n    $t = ()\n\n",
        'class $C:\n    """The $t."""\n\n    def $g(self, $u):\n        self.$u = $u\n\n',
        "from $M import $D\n\n\nclass $C($D):\n    is_$t = True\n\n",
    ),
    "held_out": (
        "class $C($D):\n    @property\n    def $t(self):\n        return self._$t\n\n",
        "class ${D}Error(Exception):\n    pass\n\n\nclass $C:\n\n",
        "class $C($D):\n    def $g(self, $t=$n):\n        super().$g($t)\n        self.$u = $t\n\n",
    ),
}

# A function, up to a place in its body.
FUNCTIONS: dict[TaskSplit, tuple[str, ...]] = {
    "train": (
        "def $f($x, $y=None):\n"
        '    """Return the $w of the $v."""\n'
        "    if $y is None:\n"
        "        $y = $x.$a\n"
        "    <here>",
        "def $f($x, $y):\n    # the $w is the first $v\n    $o = len($x)\n    <here>",
        "def $f($x, *, $y=$n):\n    $o = []\n    for $j in $x.$b:\n        $o.append($j)\n        <here>",
        "def $f($x, $y):\n    if $y.$b:\n        return $x\n    try:\n        <here>",
        "@$h\ndef $f($x, $y=True):\n    $o = $x.$b($y, $n)\n    <here>",
        "def $f($y, $x):\n    with $h($y) as $o:\n        <here>",
    ),
    "selection": (
        'def $f($x, $y):\n    """\n    Get a $v from $x.\n    """\n    $o = $x.$b[$n]\n    <here>',
        "def $f($x, $y=$n):\n    while $x.$b:\n        $x = $x.$c\n        <here>",
        "def $f($y, $x=None):\n    assert $y, 'no $v'\n    <here>",
    ),
    "held_out": (
        "def $f($y, $x):\n    # the $w comes before the $v\n    $y = $y.$c()\n    <here>",
        'def $f($x, $y=False):\n    """$v of $x, with its $w."""\n    $o = {}\n    <here>',
        "async def $f($x, $y):\n    $o = await $h($y)\n    <here>",
        "def $f(*$x, **$y):\n    for $j in $x:\n        if $j == $n:\n            break\n        <here>",
        "def $f($x, $y):\n    if not $y:\n        <here>",
    ),
}

# A method, up to a place in its body.
METHODS: dict[TaskSplit, tuple[str, ...]] = {
    "train": (
        "    def $f(self, $x, $y=None):\n        if $x is None:\n            return $y\n        <here>",
        "    def $f(self, $x, $y):\n"
        '        """Set the $w of the $v."""\n'
        "        $o = self.$b\n"
        "        <here>",
        "    @classmethod\n    def $f(cls, $x, $y):\n        self = cls($x)\n        <here>",
        "    def $f(self, $x, $y):\n        for $j in self.$b:\n            # $w first\n            <here>",
        "    def $f(self, $x, $y=$n):\n        self.$b = $x + $n\n        self.$c = $y\n        <here>",
    ),
    "selection": (
        "    def $f(self, $y, $x):\n        $o = self.$b.$c\n        <here>",
        "    def $f(self, $x, $y):\n        if self.$b:\n            self.$h($x)\n        <here>",
        "    def _$f(self, $x, *, $y):\n        # a $w for each $v\n        <here>",
    ),
    "held_out": (
        "    def $f(self, $x=$n, $y=()):\n        $o = self.$b($x)\n        <here>",
        "    def test_$f(self, $x, $y):\n        self.assertTrue($x)\n        <here>",
        '    def $f(self, $x, $y):\n        r"""\n        The $v of the $w.\n        """\n        <here>',
        "    def __$f(self, $x, $y):\n        with self.$b:\n            $o = self.$c\n            <here>",
    ),
}

# A sentence or two before prose.
PROSE: dict[TaskSplit, tuple[str, ...]] = {
    "train": (
        "It was a quiet morning in the town. ",
        "Nobody had expected much from that day. ",
        "The story is a short one and easy to tell. ",
        "This is what the old letter said. ",
    ),
    "selection": (
        "The weather had been fine all week. ",
        "Everyone in the village knew about it. ",
        "Here is an example that people often give. ",
    ),
    "held_out": (
        "A lot has been written about this. ",
        "The evening was cold and the streets were empty. ",
        "We read about it in the newspaper. ",
        "There is one more thing that should be mentioned. ",
    ),
}
