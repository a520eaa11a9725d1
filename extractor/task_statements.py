"""Templates about the kind of statement that the line is: what its first words make of it."""

from extractor.task_text import TaskSpec

TASKS: dict[str, TaskSpec] = {
    # a file is opened by a with statement or by an assignment
    "with_as": TaskSpec(
        answer=" as",
        distractor="\n",
        train=(
            """<<with|$e =>> open($x)""",
            """<<with|$e =>> $x.open($y)""",
            """<<with|$z =>> self.$g($x)""",
            """if $x:\n    <<with|$e =>> open($x, 'rb')""",
            """# read the $w\n<<with|$e =>> open($x.$a)""",
            """$z = $y.$a\n<<with|$x =>> $g($z)""",
        ),
        selection=(
            """<<with|$e =>> open($y, "r")""",
            """<<with|$z =>> $x.$g()""",
            """$x = $x + $n\n<<with|$e =>> self.open($x)""",
            """<<with|$e =>> $M.open($x, $n)""",
        ),
        held_out=(
            """<<with|$e =>> open($y, 'w')""",
            """$z = str($x)\n<<with|$e =>> open($z)""",
            """<<with|$y =>> self.$a.$g($x)""",
            """try:\n    <<with|$e =>> io.open($x)""",
        ),
    ),
    # a condition compares, an assignment assigns
    "if_equals": TaskSpec(
        answer=" ==",
        distractor=" =",
        train=(
            """<<if |>>$x""",
            """<<if |>>$x.$a""",
            """<<if |>>self.$a""",
            """$y = $y or $n\n<<if |>>$y""",
            """for $i in $x:\n    <<if |>>$i.$a""",
            """$z = $x.$g($y)\n<<if |>>$z""",
        ),
        selection=(
            """if $x:\n    return\n<<if |>>$y""",
            """$x.$g()\n<<if |>>$x.$b""",
            """while $y:\n    <<if |>>$x""",
            """# the $w first\n<<if |>>self.$b""",
        ),
        held_out=(
            """$y.$a = None\n<<if |>>$y.$a""",
            """$z = len($y)\n<<if |>>$z""",
            """<<if |>>self.$a.$b""",
            """try:\n    <<if |>>$x""",
        ),
    ),
    # a loop over something, or as long as something holds
    "for_while": TaskSpec(
        answer=" in",
        distractor=":",
        train=(
            """$z = $n\n<<for|while>> $z""",
            """$z = $g($x)\n<<for|while>> $z""",
            """$z = len($x)\n<<for|while>> $z""",
            """$z = True\n$y.$g($x)\n<<for|while>> $z""",
            """$z = $n\n$y = $x\n<<for|while>> $y""",
            """if $y:\n    $z = $x[$n]\n    <<for|while>> $z""",
        ),
        selection=(
            """$z = $y.$a\n<<for|while>> $z""",
            """$z = $y[$n]\n<<for|while>> $z""",
            """# every $w\n$z = $x.$g($y)\n<<for|while>> $z""",
            """$z = $h($y)\nself.$a = $z\n<<for|while>> $z""",
        ),
        held_out=(
            """$z = self.$a\n<<for|while>> $z""",
            """$z = $x.$a.$b\n<<for|while>> $z""",
            """try:\n    $z = $x.$g()\n    <<for|while>> $z""",
            """$z = False\n$q = len($y)\n<<for|while>> $q""",
        ),
    ),
    # the other case has no condition, one more case has one
    "else_elif": TaskSpec(
        answer=":",
        distractor=" not",
        train=(
            """if $x:\n    $z = $n\n<<else|elif>>""",
            """if $x is None:\n    return $y\n<<else|elif>>""",
            """if $y == $n:\n    self.$a = $x\n<<else|elif>>""",
            """if $x.$a:\n    $z = $y.$a\n    $z.$g($x)\n<<else|elif>>""",
            """if not $x:\n    raise ValueError($x)\n<<else|elif>>""",
            """if isinstance($y, str):\n    $y = $g($y)\n<<else|elif>>""",
        ),
        selection=(
            """if $y:\n    $x.$g($y)\n<<else|elif>>""",
            """if $y > $n:\n    $y = $x[$n]\n<<else|elif>>""",
            """if $x in self.$a:\n    del self.$a[$x]\n<<else|elif>>""",
            """if $y is $x:\n    pass\n<<else|elif>>""",
        ),
        held_out=(
            """if $y.$a is None:\n    $z = $x\n<<else|elif>>""",
            """if len($x) > $n:\n    yield $x\n<<else|elif>>""",
            """if self.$a:\n    # use the $w\n    self.$b = $y\n<<else|elif>>""",
            """if callable($y):\n    $z = $y($x)\n<<else|elif>>""",
        ),
    ),
    # a statement of its own, or the end of an assignment
    "if_ternary": TaskSpec(
        answer=":",
        distractor=" else",
        train=(
            """$z = $y<<\n| >>if $x""",
            """self.$a = $y<<\n| >>if $x.$a""",
            """$y = $g($y)<<\n| >>if $y""",
            """$z = $x.$a<<\n| >>if $x is not None""",
            """$x.$a = $n<<\n| >>if $y""",
            """$z = len($x)<<\n| >>if $x""",
        ),
        selection=(
            """$x = -$y<<\n| >>if $y""",
            """self.$b = $n<<\n| >>if $x""",
            """$z = $g($x)<<\n| >>if $x.$b""",
            """$z = $y[$n]<<\n| >>if $y""",
        ),
        held_out=(
            """$z = $x<<\n| >>if $y.$a""",
            """self.$a = str($y)<<\n| >>if $y""",
            """$y = $y.$b<<\n| >>if $y != $n""",
            """$z.$a = [$x]<<\n| >>if $x""",
        ),
    ),
    # a function without a name, or with one
    "lambda_func": TaskSpec(
        answer=":",
        distractor="(",
        train=(
            """<<$z = lambda|def>> $x""",
            """<<$g = lambda|def>> $y""",
            """<<self.$a = lambda|def>> $x""",
            """$z = $x.$a\n<<$x.$b = lambda|def>> $y""",
            """if $y is None:\n    <<$y = lambda|def>> $x""",
            """# the $w\n<<$z = lambda|def>> $v""",
        ),
        selection=(
            """$x.$a()\n<<$x = lambda|def>> $y""",
            """$z = $n\n<<$g = lambda|def>> $x""",
            """while $x:\n    <<self.$b = lambda|def>> $a""",
            """try:\n    <<$z = lambda|def>> $x""",
        ),
        held_out=(
            """if $x is not $y:\n    <<$y = lambda|def>> $a""",
            """$z = []\n<<$g = lambda|def>> $z""",
            """<<self.$a.$b = lambda|def>> $x""",
            """for $i in $x:\n    <<$z = lambda|def>> $y""",
        ),
    ),
    # a condition, or an assignment
    "var_if": TaskSpec(
        answer=":",
        distractor="\n",
        train=(
            """<<if $x ==|$x =>> True""",
            """<<if self.$a ==|self.$a =>> True""",
            """<<if $x.$a ==|$x.$a =>> False""",
            """for $i in $x:\n    <<if $y ==|$y =>> True""",
            """$z = $g($x)\n<<if $z is|$z =>> None""",
            """<<if $y.$b is|$y.$b =>> False""",
        ),
        selection=(
            """<<if $y ==|$y =>> False""",
            """$x.$g()\n<<if $x.$a is|$x.$a =>> True""",
            """while $y:\n    <<if $y is|$y =>> None""",
            """<<if self.$b is|self.$b =>> False""",
        ),
        held_out=(
            """try:\n    <<if $x ==|$x =>> False""",
            """<<if $y.$a ==|$y.$a =>> True""",
            """# no $w\n<<if self.$a is|self.$a =>> None""",
            """$z = $x.$a\n<<if $z ==|$z =>> True""",
        ),
    ),
    # a loop has a body, a function's last line has none
    "while_return_true": TaskSpec(
        answer=":",
        distractor="$end",
        train=(
            """<<while|return>> True""",
            """$z = $x.$a\n<<while|return>> True""",
            """self.$a = $y\n<<while|return>> True""",
            """if $x.$b:\n    <<while|return>> True""",
            """# until the $w\n<<while|return>> True""",
            """$x.$g($y)\n$y = $n\n<<while|return>> True""",
        ),
        selection=(
            """$z = $g($y)\n<<while|return>> True""",
            """try:\n    <<while|return>> True""",
            """self.$g()\n<<while|return>> True""",
            """$x = $x[$n]\n<<while|return>> True""",
        ),
        held_out=(
            """$z = []\n<<while|return>> True""",
            """if not $y:\n    $y = $n\n<<while|return>> True""",
            """self.$a.$g($x)\n<<while|return>> True""",
            """$y.$b = $x\n<<while|return>> True""",
        ),
    ),
    # a condition, or a function's value
    "if_return": TaskSpec(
        answer=":",
        distractor="$end",
        train=(
            """<<if|return>> $x is None""",
            """<<if|return>> $x.$a is None""",
            """<<if|return>> self.$a is not None""",
            """$z = $y.$a\n<<if|return>> $z == $n""",
            """for $i in $x:\n    <<if|return>> $i > $n""",
            """# no $w\n<<if|return>> not $y""",
        ),
        selection=(
            """$y = $y.$g()\n<<if|return>> $y is None""",
            """$x = $g($x)\n<<if|return>> $x == $n""",
            """<<if|return>> $x in $y""",
            """<<if|return>> self.$b == $y""",
        ),
        held_out=(
            """<<if|return>> $y.$a is not None""",
            """$z = $y[$n]\n<<if|return>> $z is None""",
            """<<if|return>> self.$a.$b == $n""",
            """try:\n    <<if|return>> $x == $y""",
        ),
    ),
}  # fmt: skip
