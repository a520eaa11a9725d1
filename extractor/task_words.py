"""Word pools that the slots of tasks are filled from, one set per split and no word in two splits.

A slot is `$` and a key of `SLOTS`, which says from which pool it is drawn; two slots of one prompt never
hold the same word. Names are chosen so that most are one token with a space before them in small Python
vocabularies.
"""

from typing import Literal

TaskSplit = Literal["train", "selection", "held_out"]
SPLITS: tuple[TaskSplit, ...] = ("train", "selection", "held_out")

# What each slot is drawn from.
SLOTS: dict[str, str] = {
    # functions and modules; classes
    "f": "verb", "g": "verb", "h": "verb", "M": "package", "N": "package", "C": "class", "D": "class",
    # arguments, locals (the template's and the context's), attributes, words in strings and comments
    "x": "noun", "y": "noun", "p": "noun", "q": "noun", "z": "noun", "o": "noun",
    "a": "noun", "b": "noun", "c": "noun", "w": "noun", "v": "noun", "u": "noun", "t": "noun",
    # numbers, loop variables, open files, files to read and to write
    "n": "number", "m": "number", "k": "number", "l": "number", "i": "loop", "j": "loop", "e": "stream",
    "r": "to_read", "s": "to_write",
    # small numbers of nested lists, letters that are swapped
    "one": "digit", "two": "digit", "three": "digit", 
    "left": "letter", "right": "letter", "third": "letter", "nth": "counter",
    # prose: people, a place, a thing, a verb in the past, women and men, years, plain words
    "A": "person", "B": "person", "Q": "person", "P": "place", "O": "thing", "V": "deed", "W": "woman",
    "H": "man", "S": "subject", "T": "occasion", "Y": "century", "lo": "early", "mid": "middle", "hi": "late",
    "d": "word", "E": "word", "F": "word", "G": "word", "K": "word", "L": "word",
}  # fmt: skip

WORDS: dict[str, dict[TaskSplit, tuple[str, ...]]] = {
    "verb": {
        "train": (
            "process", "load", "parse", "update", "get_value", "check", "build", "run", "convert", "add_item",
            "read_line", "set_option",
        ),
        "selection": ("apply", "fetch", "resolve", "make_copy", "collect", "register"),
        "held_out": ("handle", "create", "validate", "find", "render", "get_info", "merge", "is_valid"),
    },
    "package": {
        "train": ("os", "re", "json", "logging", "numpy"),
        "selection": ("sys", "copy", "struct"),
        "held_out": ("time", "math", "types", "warnings"),
    },
    "class": {
        "train": ("Parser", "Node", "Config", "Handler", "Reader", "TestCase", "Graph"),
        "selection": ("Module", "Token", "Option", "Builder"),
        "held_out": ("Index", "Context", "Writer", "Frame", "Element"),
    },
    "noun": {
        "train": (
            "name", "value", "data", "path", "key", "text", "line", "args", "node", "result", "index", "size",
            "type", "mode", "shape", "source", "other", "option", "model", "array", "state", "message",
            "device", "token", "block", "method", "dtype", "weight", "parent", "group",
        ),
        "selection": (
            "config", "item", "length", "base", "target", "label", "order", "param", "field", "cache",
            "frame", "column", "element", "level", "image", "object",
        ),
        "held_out": (
            "values", "output", "context", "default", "start", "input", "code", "options", "module", "params",
            "offset", "version", "count", "format", "batch", "user", "mask", "func", "string", "nodes",
        ),
    },
    "number": {
        "train": ("1", "2", "3", "5", "8", "10", "12", "20"),
        "selection": ("6", "11", "13", "15", "30", "100"),
        "held_out": ("0", "4", "7", "9", "16", "32", "64"),
    },
    "digit": {
        "train": ("1", "2", "3", "5"),
        "selection": ("6", "11", "13", "15"),
        "held_out": ("0", "4", "7", "9"),
    },
    "letter": {
        "train": ("a", "b", "c", "d", "s", "t"),
        "selection": ("e", "g", "n", "o"),
        "held_out": ("m", "p", "v", "w", "x"),
    },
    "loop": {"train": ("i", "q"), "selection": ("k", "n"), "held_out": ("j", "m")},
    "counter": {"train": ("i",), "selection": ("k",), "held_out": ("j",)},
    "stream": {
        "train": ("f", "fp", "file"),
        "selection": ("fin", "fd"),
        "held_out": ("fh", "stream", "f_obj"),
    },
    "to_read": {
        "train": ("source", "infile", "template", "existing"),
        "selection": ("in_path", "original"),
        "held_out": ("input", "readme", "src"),
    },
    "to_write": {
        "train": ("result", "outfile", "generated", "log_file"),
        "selection": ("out_path", "target"),
        "held_out": ("output", "report", "dst"),
    },
    "person": {
        "train": ("John", "Mary", "Tom", "James", "Paul", "Anna", "David", "Sarah"),
        "selection": ("Peter", "Kate", "Mark", "Lisa"),
        "held_out": ("Jack", "Alice", "Robert", "Emma", "Simon", "Laura"),
    },
    "place": {
        "train": ("school", "store", "park", "office"),
        "selection": ("station", "garden", "bank", "museum"),
        "held_out": ("beach", "market", "hospital", "library", "hotel"),
    },
    "thing": {
        "train": ("book", "ring", "drink", "letter"),
        "selection": ("bag", "ball"),
        "held_out": ("coin", "card", "cake"),
    },
    "deed": {
        "train": ("gave", "handed", "offered"),
        "selection": ("sent", "sold"),
        "held_out": ("passed", "brought", "showed"),
    },
    "woman": {
        "train": ("queen", "mother", "woman", "aunt", "actress"),
        "selection": ("girl", "bride", "lady", "princess"),
        "held_out": ("sister", "daughter", "wife", "widow"),
    },
    "man": {
        "train": ("king", "father", "man", "uncle", "actor"),
        "selection": ("boy", "groom", "gentleman", "prince"),
        "held_out": ("brother", "son", "husband", "monk"),
    },
    "subject": {
        "train": ("teacher", "picture", "window", "doctor", "bird"),
        "selection": ("student", "table", "house", "singer", "worker", "boat"),
        "held_out": ("farmer", "lamp", "road", "player", "chair"),
    },
    "occasion": {
        "train": ("war", "strike", "trial", "project"),
        "selection": ("dispute", "reform"),
        "held_out": ("siege", "journey", "expedition"),
    },
    "century": {"train": ("17", "19"), "selection": ("18",), "held_out": ("16", "14")},
    "early": {
        "train": ("12", "20", "22", "28", "31", "35"),
        "selection": ("11", "13", "15", "26"),
        "held_out": ("21", "24", "25", "33", "38"),
    },
    "middle": {
        "train": ("41", "44", "47", "52", "56"),
        "selection": ("42", "48", "55"),
        "held_out": ("43", "46", "51", "54", "57"),
    },
    "late": {
        "train": ("61", "67", "72", "76", "83", "89"),
        "selection": ("63", "71", "85"),
        "held_out": ("65", "68", "74", "78", "87"),
    },
    "word": {
        "train": (
            "river", "stone", "paper", "music", "winter", "bread", "forest", "silver", "horse", "dinner",
            "island", "cotton",
        ),
        "selection": ("water", "light", "summer", "iron", "bridge", "coffee", "mirror", "valley"),
        "held_out": (
            "mountain", "sugar", "spring", "ocean", "flower", "engine", "kitchen", "copper", "village",
            "shadow",
        ),
    },
}  # fmt: skip
