"""Templates about names and what is known of them: arguments, loop variables, earlier values, depth."""

from dataclasses import replace

from extractor.task_text import TaskSpec

TASKS: dict[str, TaskSpec] = {
    # an argument after one with a default has one too
    "final_kwarg": TaskSpec(
        answer="=",
        distractor="):",
        train=(
            """def $h(self, $y):\n    self.$y = $y\n\ndef $f(self, $x<<=None|>>, $y""",
            """def $h(self, $a, $y):\n    return self.$a\n\ndef $f(self, $x<<=None|>>, $y""",
            """def $h($y):\n    return $y.$a\n\n\ndef $f($x<<=None|>>, $y""",
            """def $h(self, $a, $y):\n    self.$y = $a\n\ndef $f(self, $x<<=False|>>, $y""",
            """def $h($a, $b, $y):\n    $y.$g($a)\n\n\ndef $f($x<<=True|>>, $y""",
            """def $h(self, $y):\n    # the $w\n    pass\n\ndef $f(self, $x<<=$n|>>, $y""",
            """def $h(self, $y):\n    return self.$a.$g($y)\n\ndef $f(self, $x<<=None|>>, $y""",
            """def $h($y):\n    $y.$g()\n\n\ndef $f($x<<=$n|>>, $y""",
            """def $h(self, $a, $b, $y):\n    self.$a = $b\n\ndef $f(self, $x<<=True|>>, $y""",
            """class $M:\n    def $h(self, $y):\n        self.$a = $y\n\n    def $f(self, $x<<=None|>>, $y""",
            """def $h(self, $y):\n    self.$a.$b = $y\n\ndef $f(self, $x<<=False|>>, $y""",
            """def $h($a, $y):\n    return $a + $y\n\n\ndef $f($x<<=None|>>, $y""",
        ),
        selection=(
            """def _$h(self, $y):\n    return $y\n\ndef _$f(self, $x<<=None|>>, $y""",
            """def $h($y):\n    pass\n\n\ndef $f($x<<=False|>>, $y""",
            """def $h($b, $y):\n    return $b\n\n\ndef $f($x<<=None|>>, $y""",
            """def $h(self, $b, $y):\n    $y.$a = self.$b\n\ndef $f(self, $x<<=None|>>, $y""",
            """def $h($a, $y):\n    return $a[$y]\n\n\ndef $f($x<<=True|>>, $y""",
            """def $h(self, $y):\n    raise ValueError($y)\n\ndef $f(self, $x<<=$n|>>, $y""",
            """class $M:\n    def $h(self, $b, $y):\n        pass\n\n    def $f(self, $x<<=False|>>, $y""",
            """def _$h(self, $y):\n    del self.$a[$y]\n\ndef _$f(self, $x<<=None|>>, $y""",
        ),
        held_out=(
            """def __$h(self, $y):\n    self.$a = $y\n\ndef __$f(self, $x<<=None|>>, $y""",
            """def $h($a, $y):\n    $a.$b = $y\n\n\ndef $f($x<<=None|>>, $y""",
            """def $h(self, $a, $y):\n    if $a:\n        return $y\n\ndef $f(self, $x<<=False|>>, $y""",
            """def _$h($y):\n    yield $y\n\n\ndef _$f($x<<=$n|>>, $y""",
        ),
    ),
    # a set is added to, a string grows
    "set_or_string": TaskSpec(
        answer=".",
        distractor=" +=",
        train=(
            """$z = <<set()|"">>\nfor $i in $x:\n    $z""",
            """$z = <<set()|"">>\nwhile $y:\n    $z""",
            """$z = <<set()|"">>\nfor $i in $x.$a:\n    if $i:\n        $z""",
            """$z = <<set()|"">>\nif $x is not None:\n    $z""",
            """$z = <<set()|"">>\nfor $i in range($n):\n    $z""",
            """$z = <<set()|"">>\n$y = self.$a\nfor $i in $y:\n    $z""",
        ),
        selection=(
            """$z = <<set()|"">>\nif $y:\n    $z""",
            """$z = <<set()|"">>\nfor $i in self.$a:\n    $z""",
            """$z = <<set()|"">>\nfor $i in $x.$g():\n    $z""",
            """$z = <<set()|"">>\n$z""",
        ),
        held_out=(
            """$z = <<set()|"">>\nfor $i in $y:\n    # the $w\n    $z""",
            """$z = <<set()|"">>\nwhile $x.$a:\n    $z""",
            """$z = <<set()|"">>\nfor $i, $a in $y:\n    $z""",
            """$z = <<set()|"">>\nif $x.$b:\n    $z""",
        ),
    ),
    "set_or_string_fixedvarname": TaskSpec(
        answer=".",
        distractor=" +=",
        train=(
            """current = <<set()|"">>\nfor $i in $x:\n    current""",
            """current = <<set()|"">>\nwhile $y:\n    current""",
            """current = <<set()|"">>\nfor $i in $x.$a:\n    if $i:\n        current""",
            """current = <<set()|"">>\nif $x is not None:\n    current""",
            """current = <<set()|"">>\nfor $i in range($n):\n    current""",
            """current = <<set()|"">>\n$y = self.$a\nfor $i in $y:\n    current""",
        ),
        selection=(
            """current = <<set()|"">>\nif $y:\n    current""",
            """current = <<set()|"">>\nfor $i in self.$a:\n    current""",
            """current = <<set()|"">>\nfor $i in $x.$g():\n    current""",
            """current = <<set()|"">>\ncurrent""",
        ),
        held_out=(
            """current = <<set()|"">>\nfor $i in $y:\n    # the $w\n    current""",
            """current = <<set()|"">>\nwhile $x.$a:\n    current""",
            """current = <<set()|"">>\nfor $i, $a in $y:\n    current""",
            """current = <<set()|"">>\nif $x.$b:\n    current""",
        ),
    ),
    # an attribute is set from the argument of its name
    "class_init": TaskSpec(
        answer=" $x",
        distractor=" $y",
        train=(
            "def __init__(self, $p, $q, $x, $y):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $x, $p, $q, $y):\n"
            "    # $w\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x=None, $y=None):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $x, $y):\n"
            "    super().__init__()\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $x, $q, $y):\n"
            "    self.$q = $q\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x, $y=$n):\n"
            "    self.$q = $q\n"
            "    self.$a = $n\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x, $y):\n"
            '    """Keep the $w."""\n'
            "    self.$q = $q\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $x, $p, $y):\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x=False, $y=True):\n"
            "    self.$q = $q\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $y, $q, $x):\n"
            "    self.$a = {}\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $a, $q, $x, $y):\n"
            "    super().__init__()\n"
            "    self.$a = $a\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $x, $y=None):\n"
            "    super().__init__($p)\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
        ),
        selection=(
            "def __init__(self, $p, $x, $y, $q=False):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $y, $x=None):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $y, $x):\n"
            '    """A $w."""\n'
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $x, $q, $p=(), $y=None):\n"
            "    self.$q = $q\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x, $y=()):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.$b = $n\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $y, $q, $x, $p):\n"
            "    # a $w\n"
            "    self.$q = $q\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $q, $x, $y, *$p):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $b, $x, $y):\n"
            "    # no $w\n"
            "    self.$b = $b\n"
            "    self.$p = $p\n"
            "    self.<<$x|$y>> =",
        ),
        held_out=(
            "def __init__(self, $p, $q, $a, $x, $y):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.$a = $a\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $q, $x, $y):\n"
            "    $D.__init__(self)\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $y, $p, $q, $x):\n"
            "    # the $w\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
            "def __init__(self, $p, $x, $q, $y, *, $a):\n"
            "    self.$p = $p\n"
            "    self.$q = $q\n"
            "    self.<<$x|$y>> =",
        ),
    ),
    # what stood first on the left stands last on the right
    "var_swap": TaskSpec(
        answer=" $left",
        distractor=" $third",
        train=(
            """<<$left|$third>>, $right = $right,""",
            """while $left > $n:\n    <<$left|$third>>, $right = $right,""",
            """for $x in $y:\n    <<$left|$third>>, $right = $right,""",
            """$right = $n\n<<$left|$third>>, $right = $right,""",
            """# swap $w and $v\n<<$left|$third>>, $right = $right,""",
            """$right = $x[$n]\nself.$a = $right\n<<$left|$third>>, $right = $right,""",
            """if $left > $n:\n    <<$left|$third>>, $right = $right,""",
            """$right = $x.$a\n<<$left|$third>>, $right = $right,""",
            """with $x.$a:\n    <<$left|$third>>, $right = $right,""",
            """$right = $g($y)\n<<$left|$third>>, $right = $right,""",
            """self.$a = $right\n<<$left|$third>>, $right = $right,""",
            """if not $x:\n    $right = $n\n    <<$left|$third>>, $right = $right,""",
        ),
        selection=(
            """$right = len($x)\n<<$left|$third>>, $right = $right,""",
            """if $x.$a:\n    <<$left|$third>>, $right = $right,""",
            """$right = $x.$g($y)\n<<$left|$third>>, $right = $right,""",
            """try:\n    <<$left|$third>>, $right = $right,""",
            """# the other $w\n<<$left|$third>>, $right = $right,""",
            """while $y:\n    <<$left|$third>>, $right = $right,""",
            """$right = $x + $n\n<<$left|$third>>, $right = $right,""",
            """for $i in $x.$b:\n    <<$left|$third>>, $right = $right,""",
        ),
        held_out=(
            """$right = $y - $n\n<<$left|$third>>, $right = $right,""",
            """if $y:\n    $right = $y.$b\n    <<$left|$third>>, $right = $right,""",
            """$right = self.$a\n<<$left|$third>>, $right = $right,""",
            """while $x:\n    $right = $n\n    <<$left|$third>>, $right = $right,""",
        ),
    ),
    # the body of a loop is one step deeper than the loop
    "indent_for": TaskSpec(
        answer="\n        ",
        distractor="\n    ",
        train=(
            """if not $y:\n    $y = $n\n<<    |>>for $i in $x:""",
            """with $x.$a:\n    $z = []\n<<    |>>for $i in $y:""",
            """for $j in $y:\n    $z = $j.$a\n<<    |>>for $i in $z:""",
            """if $x is None:\n    $x = self.$a\n<<    |>>for $i in range($n):""",
            """while $y:\n    $y.$g()\n<<    |>>for $i in $x.$a:""",
            """$z = $n\nif $y:\n    $z = $x\n<<    |>>for $i, $a in $z:""",
            """if $x.$a:\n    self.$b = $x\n<<    |>>for $i in $x.$a:""",
            """while $x:\n    # the $w\n    $z = $n\n<<    |>>for $i in $y:""",
            """for $a in $y:\n    $y = $g($a)\n<<    |>>for $i in range($n):""",
            """with $y.$b:\n    $y.$g($x)\n<<    |>>for $i in $x:""",
            """if $y == $n:\n    $x = []\n<<    |>>for $i in self.$a:""",
            """if not $x:\n    $z = $y[$n]\n<<    |>>for $i in $z:""",
        ),
        selection=(
            """if $y:\n    $x.$g()\n<<    |>>for $i in $x:""",
            """for $a in $x:\n    $z = $n\n<<    |>>for $i in $y:""",
            """with self.$b:\n    $x = $y\n<<    |>>for $i in $x:""",
            """if $x.$b:\n    $z = {}\n<<    |>>for $i in $y.$b:""",
            """while $x.$b:\n    $x.$g()\n<<    |>>for $i in $y:""",
            """if $y is not None:\n    $y = $h($x)\n<<    |>>for $i in $y:""",
            """for $j in $x.$b:\n    self.$b = $j\n<<    |>>for $i in range($n):""",
            """if $x > $n:\n    # no $w\n    $z = $x\n<<    |>>for $i in $z.$b:""",
        ),
        held_out=(
            """if $x != $n:\n    self.$a = $y\n<<    |>>for $i in self.$b:""",
            """with $y:\n    $z = $x[$n]\n<<    |>>for $i in $z:""",
            """for $a in $x:\n    $a.$g($y)\n<<    |>>for $i in $y.$b:""",
            """while $x > $n:\n    $x = $y\n<<    |>>for $i in sorted($y):""",
        ),
    ),
    # two loop variables come from enumerate, one from range
    "enumerate_range": TaskSpec(
        answer=" enumerate~",
        distractor=" range",
        train=(
            """for $nth<<, $z|>> in""",
            """$z = []\nfor $nth<<, $a|>> in""",
            """if $x:\n    for $nth<<, $z|>> in""",
            """# every $w\nfor $nth<<, $w|>> in""",
            """$y = len($x)\nfor $nth<<, $z|>> in""",
            """self.$a = $n\nfor $nth<<, $b|>> in""",
            """$z = $x.$a.$b\nfor $nth<<, $y|>> in""",
            """with $x:\n    for $nth<<, $a|>> in""",
            """$x.$g($y)\nfor $nth<<, $z|>> in""",
            """with $x.$a:\n    for $nth<<, $b|>> in""",
            """$y = $x[$n]\nfor $nth<<, $a|>> in""",
            """if not $x:\n    return $y\nfor $nth<<, $z|>> in""",
        ),
        selection=(
            """$z = {}\nfor $nth<<, $v|>> in""",
            """$x = $x.$a\nfor $nth<<, $z|>> in""",
            """try:\n    for $nth<<, $a|>> in""",
            """self.$g()\nfor $nth<<, $z|>> in""",
            """$z = $n\n$y.$b = $z\nfor $nth<<, $a|>> in""",
            """# all of the $w\nfor $nth<<, $z|>> in""",
            """if $y.$b:\n    for $nth<<, $z|>> in""",
            """self.$b = {}\nfor $nth<<, $v|>> in""",
        ),
        held_out=(
            """$z = $n\nfor $nth<<, $a|>> in""",
            """if not $y:\n    for $nth<<, $z|>> in""",
            """$z = $g($x)\nfor $nth<<, $b|>> in""",
            """while $x:\n    for $nth<<, $z|>> in""",
        ),
    ),
}  # fmt: skip

# the same prompts, with two things to go through at a time
TASKS["zip_range"] = replace(TASKS["enumerate_range"], answer=" zip")
