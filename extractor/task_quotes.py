"""Templates about what was opened: quotes, brackets, braces, formatted strings, files."""

from extractor.task_text import TaskSpec

TASKS: dict[str, TaskSpec] = {
    # the string is closed as it was opened
    "single_double_quote": TaskSpec(
        answer="')",
        distractor='")',
        train=(
            """print(<<'|">>$w""",
            """$x.$g(<<'|">>$w $v""",
            """if $y:\n    return $g(<<'|">>$v""",
            """raise ValueError(<<'|">>$w of the $v""",
            """$z = $x.get(<<'|">>$w""",
            """if not $x.startswith(<<'|">>$w""",
        ),
        selection=(
            """$z = $g(<<'|">>$v""",
            """$z = []\n$z.append(<<'|">>$w""",
            """raise KeyError(<<'|">>no $w""",
            """self.$g(<<'|">>$w of $v""",
        ),
        held_out=(
            """logger.warning(<<'|">>$w $v""",
            """for $i in $x.split(<<'|">>$w""",
            """raise TypeError(<<'|">>$v must be a $w""",
            """$z = os.path.join(<<'|">>$w""",
        ),
    ),
    # a subscript or a call
    "bracket_paren": TaskSpec(
        answer="]",
        distractor=")",
        train=(
            """$z = $x<<[|(>>$y""",
            """return $x.$a<<[|(>>$y""",
            """for $i in self.$a<<[|(>>$x""",
            """if $y:\n    $x = $x<<[|(>>$n""",
            """$z = self.$a<<[|(>>$y""",
            """del $y\nreturn self.$a<<[|(>>$x.$b""",
        ),
        selection=(
            """$x = $y.$a<<[|(>>$x""",
            """if $x.$a<<[|(>>$y""",
            """$z = $n\nself.$a = $y<<[|(>>$z""",
            """print($x<<[|(>>$y""",
        ),
        held_out=(
            """self.$a = $x<<[|(>>$y""",
            """with $x.$a<<[|(>>$y""",
            """$z, _ = $y.$a<<[|(>>$x""",
            """while $x:\n    $x = self.$a<<[|(>>$x""",
        ),
    ),
    # a dict has a value after its first string, a list a comma
    "bracket_brace": TaskSpec(
        answer='":',
        distractor='",',
        train=(
            """$z = <<{|[>>"$w""",
            """return <<{|[>>"$v""",
            """self.$a = <<{|[>>"$w""",
            """if $x is None:\n    $x = <<{|[>>"$v""",
            """$z = $x.$g($y)\n$z.$a = <<{|[>>"${w}_$v""",
            """for $i in <<{|[>>"$v""",
            """$x.$a[$n] = <<{|[>>"$w""",
            """if $y:\n    return <<{|[>>"${w}_$v""",
            """print(<<{|[>>"$w""",
            """$z = $g(<<{|[>>"$v""",
            """while $x:\n    $x.$a = <<{|[>>"$w""",
            """# the $u\n$q = <<{|[>>"$w""",
        ),
        selection=(
            """$x.$a += <<{|[>>"$v""",
            """$z = $n\n$x.$b = <<{|[>>"${v}s""",
            """yield <<{|[>>"$w""",
            """assert $y == <<{|[>>"$w""",
            """with $x.$a:\n    self.$b = <<{|[>>"$v""",
            """$y = $x\n$z = <<{|[>>"${v}_$w""",
            """$x.$g(<<{|[>>"$w""",
            """for $i in $x:\n    $i.$a = <<{|[>>"$v""",
        ),
        held_out=(
            """self.$a = self.$b or <<{|[>>"$v""",
            """try:\n    $z = <<{|[>>"is_$w""",
            """$z = $y if $x else <<{|[>>"$v""",
            """assert $x.$a == <<{|[>>"$w""",
        ),
    ),
    # a flat list or one within another
    "bracket_counting": TaskSpec(
        answer="]]",
        distractor="]",
        train=(
            """$z = $x[$y[$n]]\nself.$a = <<[|>>[$one, $two], [$two, $one""",
            """$z = $x[$y[$n]]\n$q = <<[|>>[$one, $two], [$two, $three""",
            """$z = $x[$y[$n]]\n$z.$a = <<[|>>[$one, $two], [$three, $one""",
            """$z, $q = $y[$x[$n]]\n$p = <<[|>>[$one, $one], [$two, $two""",
            """# the $w\n$q = $x.$a[$y[$n]]\n$y = <<[|>>[$one, $two], [$three, $two""",
            """$z = $y[$x[$n]]\n$z = $z + <<[|>>[$one, $two], [$two, $one""",
            """$z = $x[$y[$n]]\n$x.$g($y)\n$q = <<[|>>[$one, $two], [$one, $three""",
            """$z = $x[$y[$n]]\nfor $i in $z:\n    $q = <<[|>>[$two, $one], [$three, $two""",
            """$z = $x[$y[$n]]\nreturn <<[|>>[$one, $two], [$two, $one""",
            """self.$a = $x[$y[$n]]\nself.$b = <<[|>>[$one, $two], [$one, $two""",
            """$z = $x[$y[$n]] + $n\n$z.$a = <<[|>>[$two, $three], [$one, $two""",
            """$z = not $x[$y[$n]]\nif $z:\n    $p = <<[|>>[$one, $three], [$two, $one""",
        ),
        selection=(
            """$q = $x[self.$a[$n]]\nself.$b = <<[|>>[$one, $two], [$two, $three""",
            """del $x[$y[$n]]\n$z = <<[|>>[$two, $one], [$one, $two""",
            """$z = $y[$x[$n]]\n$p = $q = <<[|>>[$one, $two], [$three, $two""",
            """$x = $y[$x[-$n]]\n# $w\n$z = <<[|>>[$one, $one], [$two, $three""",
            """$x[$y[$n]] = $z\n$q = <<[|>>[$one, $two], [$three, $one""",
            """$z = $y.$a[$x[$n]]\nself.$a = <<[|>>[$three, $one], [$two, $one""",
            """self.$b = $x[$y[$n]]\n$x.$a = <<[|>>[$two, $one], [$one, $three""",
            """$z = -$x[$y[$n]]\nself.$b = $q = <<[|>>[$one, $two], [$two, $three""",
        ),
        held_out=(
            """$z = $x.$a[$y[$n]]\n$q = <<[|>>[$one, $two], [$two, $one""",
            """$y = self.$b[$x[$n]]\nself.$c = <<[|>>[$two, $one], [$one, $three""",
            """if $y:\n    $z = $x[$y[$n]]\n    $q = <<[|>>[$one, $two], [$two, $three""",
            """$z = $g($x[$y[$n]])\n$q = $y[$x[$n]]\n$p = <<[|>>[$one, $two], [$one, $three""",
        ),
    ),
    # a formatted string has a name in braces, a plain one a per cent sign, as the line before it
    "fstring_brace": TaskSpec(
        answer=" {",
        distractor=" %",
        train=(
            """print("$u %s" % $x)\nprint(<<f|>>"$w $v:""",
            """if not $x:\n    raise KeyError("$u %r" % $x)\nraise ValueError(<<f|>>"unknown $w""",
            """$y = "%s" % $x\nreturn <<f|>>"$w""",
            """if $x > $n:\n    print("$u %d" % $x)\n$z = <<f|>>"$w $v""",
            """$z = "$u: %s" % $y\n$x.$g(<<f|>>"$w $v:""",
            """self.$a = "%s $u" % $y\nself.$b = <<f|>>"$w $v""",
        ),
        selection=(
            """print("%s is $u" % $y)\nprint(<<f|>>"the $w:""",
            """$y = "$u %d" % $n\n$z = <<f|>>"$w of $v""",
            """if $x:\n    return "$u (%s)" % $x\nreturn <<f|>>"$w $v""",
            """$x.$g("$u %s" % $y)\n$x.$h(<<f|>>"$w:""",
        ),
        held_out=(
            """logging.info("no $u %s" % $y)\nlogging.info(<<f|>>"$w $v:""",
            """try:\n    $z = "%s.$u" % $x\n    $y = <<f|>>"$w $v""",
            """if $y:\n    raise TypeError("bad $u %s" % $y)\nraise RuntimeError(<<f|>>"cannot find $w""",
            """$z = ["$u %s" % $x]\n$z.append(<<f|>>"$w $v""",
        ),
    ),
    # what a file is opened for, by its name
    "with_open": TaskSpec(
        answer="r",
        distractor="w",
        train=(
            """with open(<<$r|$s>>, \"""",
            """$e = open(<<$r|$s>>, \"""",
            """with open(self.<<$r|$s>>, \"""",
            """with open(<<${r}|${s}>>_path, '""",
            """$e = open($x.<<$r|$s>>, '""",
            """if $y:\n    with open(<<$r|$s>>, '""",
        ),
        selection=(
            """return open(<<$r|$s>>, \"""",
            """$z = $n\nwith open(<<$r|$s>>, '""",
            """with open($x.<<$r|$s>>, \"""",
            """self.$e = open(<<$r|$s>>, '""",
        ),
        held_out=(
            """with io.open(<<$r|$s>>, '""",
            """with open(<<${r}|${s}>>_file, \"""",
            """try:\n    $e = open(<<$r|$s>>, \"""",
            """with open(self._<<$r|$s>>, '""",
        ),
    ),
}  # fmt: skip
