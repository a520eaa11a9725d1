"""Templates for checkpoints that read English; `docstring_argument` is Python with a docstring.

Which words are one token depends on the checkpoint's tokenizer; a task none of whose pairs fits is refused
by name.
"""

from extractor.task_text import TaskSpec

TASKS: dict[str, TaskSpec] = {
    # who receives is the one of the two who does not give
    "indirect_object": TaskSpec(
        prose=True,
        answer=" $B",
        distractor=" $A",
        train=(
            "When $A and $B went to the $P, <<$A|$B>> $V a $O to",
            "Then $A and $B had a long talk, and <<$A|$B>> $V a $O to",
            "$A and $B met at the $P. After a while <<$A|$B>> $V the $O to",
            "While $A and $B were at the $P, <<$A|$B>> $V a $O to",
            "$A and $B were friends. One day <<$A|$B>> $V a $O to",
            "After $A and $B left the $P, <<$A|$B>> $V the $O to",
        ),
        selection=(
            "$A and $B came back from the $P, where <<$A|$B>> $V a $O to",
            "Before $A and $B said goodbye, <<$A|$B>> $V the $O to",
            "Since $A and $B live near the $P, <<$A|$B>> $V a $O to",
            "Once $A and $B had lunch together, and <<$A|$B>> $V a $O to",
        ),
        held_out=(
            "Last week $A and $B walked to the $P, and <<$A|$B>> $V the $O to",
            "$A and $B sat down in the $P. Smiling, <<$A|$B>> $V a $O to",
            "As $A and $B waited outside the $P, <<$A|$B>> $V the $O to",
            "The $P was full when $A and $B arrived. There <<$A|$B>> $V a $O to",
        ),
    ),
    # a later or an earlier year. (To change the first year, y to z, would not do: an answer that is right on
    # one side only has y < a <= z, the other z < d <= y: there are none. So the direction changes.)
    "greater_than": TaskSpec(
        prose=True,
        answer="$hi",
        distractor="$lo",
        train=(
            "The first $T was in the year $Y$mid. The one <<after|before>> it was in the year $Y",
            "It did not happen in $Y$mid but some years <<later|earlier>>, in the year $Y",
            "The $T of $Y$mid is well known. Much <<later|earlier>>, there was another in $Y",
            "Their $T came <<after|before>> the year $Y$mid, probably in the year $Y",
            "A $T <<follows|precedes>> that of the year $Y$mid; it dates from the year $Y",
            "The report on the $T is <<newer|older>> than the year $Y$mid; it is from the year $Y",
        ),
        selection=(
            "This $T took place <<after|before>> $Y$mid; most people say in $Y",
            "The second $T was <<later|earlier>> than the year $Y$mid. It was in the year $Y",
            "What came <<after|before>> the $T of $Y$mid was a quiet year, the year $Y",
            "Some years <<after|before>> $Y$mid they had a $T, in the year $Y",
        ),
        held_out=(
            "Historians place the $T <<after|before>> the year $Y$mid, namely in the year $Y",
            "The $T was not in $Y$mid. It was long <<after|before>> that, in the year $Y",
            "Compared with the year $Y$mid, the $T was <<later|earlier>>: the year $Y",
            "From $Y$mid one looks <<forward|back>> to the $T of the year $Y",
        ),
    ),
    # the verb agrees with the first noun, not with the last
    "subject_verb_agreement": TaskSpec(
        prose=True,
        answer=" is",
        distractor=" are",
        train=(
            "The ${S}<<|s>> near the $P",
            "I think that the ${S}<<|s>> in the $P",
            "Everyone says the ${S}<<|s>> from the $P",
            "As we know, the ${S}<<|s>> behind the $P",
            "They told me that the ${S}<<|s>> of the $P",
            "The old ${S}<<|s>> next to the $P",
        ),
        selection=(
            "It seems that the ${S}<<|s>> at the $P",
            "The ${S}<<|s>> across from the $P",
            "We heard that the new ${S}<<|s>> by the $P",
            "Perhaps the ${S}<<|s>> outside the $P",
        ),
        held_out=(
            "In this picture the ${S}<<|s>> beside the $P",
            "She wrote that the ${S}<<|s>> around the $P",
            "The best ${S}<<|s>> inside the $P",
            "According to the paper, the ${S}<<|s>> close to the $P",
        ),
    ),
    # he or she
    "gendered_pronoun": TaskSpec(
        prose=True,
        answer=" he",
        distractor=" she",
        train=(
            "The <<$H|$W>> was tired because",
            "The <<$H|$W>> went home when",
            "My <<$H|$W>> said that",
            "The <<$H|$W>> did not know what",
            "The old <<$H|$W>> smiled, and then",
            "Everyone asked the <<$H|$W>> whether",
        ),
        selection=(
            "The <<$H|$W>> was late, so",
            "Your <<$H|$W>> told us that",
            "The young <<$H|$W>> waited until",
            "The <<$H|$W>> was happy, but",
        ),
        held_out=(
            "The <<$H|$W>> opened the door as soon as",
            "His friend's <<$H|$W>> thought that",
            "The <<$H|$W>> has lived here since",
            "When the <<$H|$W>> came in,",
        ),
    ),
    # the arguments are described in their order
    "docstring_argument": TaskSpec(
        answer=" $x",
        distractor=" $y",
        train=(
            "def $f(self, $p, $q, <<$x, $y|$y, $x>>):\n"
            '    """$w $v\n'
            "\n"
            "    :param $p: $u $a\n"
            "    :param $q: $b $c\n"
            "    :param",
            "def $f($p, $q, <<$x, $y|$y, $x>>):\n"
            '    """\n'
            "    :param $p: $w $v\n"
            "    :param $q: $u $a\n"
            "    :param",
            'def $f(self, $p, <<$x, $y|$y, $x>>):\n    """The $w.\n\n    :param $p: $v $u\n    :param',
            "def _$f($p, $q, <<$x, $y|$y, $x>>):\n"
            '    """$w of $v\n'
            "\n"
            "    @param $p: $u\n"
            "    @param $q: $a\n"
            "    @param",
            "def $f(self, $p, $q, <<$x, $y|$y, $x>>):\n"
            '    """$w\n'
            "\n"
            "    :arg $p: $v\n"
            "    :arg $q: $u\n"
            "    :arg",
            "def $f($p, $q, <<$x, $y|$y, $x>>=None):\n"
            '    """$w $v.\n'
            "\n"
            "    :param $p: $u\n"
            "    :param $q: $a $b\n"
            "    :param",
        ),
        selection=(
            'def $f($p, <<$x, $y|$y, $x>>):\n    """A $w\n\n    :param $p: $u $v\n    :param',
            "def _$f(self, $p, $q, <<$x, $y|$y, $x>>):\n"
            '    """\n'
            "    @param $p: the $w\n"
            "    @param $q: the $v\n"
            "    @param",
            "def $f(self, $p, $q, <<$x, $y|$y, $x>>, $z):\n"
            '    """Get $w\n'
            "\n"
            "    :param $p: $u\n"
            "    :param $q: $v\n"
            "    :param",
            "def $f($p, $q, <<$x, $y|$y, $x>>):\n"
            '    """$w\n'
            "\n"
            "    :param $p: $v, $u\n"
            "    :param $q: $a, $b\n"
            "    :param",
        ),
        held_out=(
            "def $f(self, $p, $q, <<$x, $y|$y, $x>>):\n"
            '    """Make a $w\n'
            "\n"
            "    :param $p: one $v\n"
            "    :param $q: one $u\n"
            "    :param",
            "def $f($p, $q, $a, <<$x, $y|$y, $x>>):\n"
            '    """$w.\n'
            "\n"
            "    :param $p: $v\n"
            "    :param $q: $u\n"
            "    :param $a: $b\n"
            "    :param",
            "def __$f(self, $p, $q, <<$x, $y|$y, $x>>):\n"
            '    """$w $v\n'
            "\n"
            "    :param $p: $u or $a\n"
            "    :param $q: $b or $c\n"
            "    :param",
            "def $f($p, $q, <<$x, $y|$y, $x>>, **$z):\n"
            '    """$w\n'
            "\n"
            "    @param $p: $v $u\n"
            "    @param $q: $a $b\n"
            "    @param",
        ),
    ),
    # what stood after the word before stands after it again
    "induction": TaskSpec(
        prose=True,
        answer=" $K",
        distractor=" $L",
        train=(
            "First: $d $E $F <<$K|$L>> $G. Then: $d $E $F",
            "The words were $d, $E, <<$K|$L>> and $F. Once more: $d, $E,",
            "$d $E <<$K|$L>> $F $G $d $E",
            "He wrote $E $F $d <<$K|$L>>, and I wrote $E $F $d",
            "Say $G $E <<$K|$L>> $d now and $G $E",
            "One list is $d $G <<$K|$L>> $E; the other list is $d $G",
        ),
        selection=(
            "Read $F $d <<$K|$L>> $E twice: $F $d",
            "$G $F <<$K|$L>> $d and again $G $F",
            "The first row is $d $F $G <<$K|$L>>. The second row is $d $F $G",
            "Remember $E, $d, <<$K|$L>>, $G; repeat $E, $d,",
        ),
        held_out=(
            "The code is $F $E $d <<$K|$L>> $G and the reply is $F $E $d",
            "She sang $d $E <<$K|$L>> $F, he sang $d $E",
            "Left: $G, $d, <<$K|$L>>, $E. Right: $G, $d,",
            "$E $G $d <<$K|$L>> $F, $E $G $d",
        ),
    ),
}  # fmt: skip
