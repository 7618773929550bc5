"""The `koff` command: a table of verbs. A verb imports what is heavy only when it runs, so help is immediate."""

import errno
import signal
import sys
import warnings
from importlib import import_module

from koff_lightning import __version__
from koff_lightning.support.ending import SIGNALS, Ended, ended_by, watch_the_launcher
from koff_lightning.support.errors import KoffError
from koff_lightning.support.heap import keep_freed
from koff_lightning.support.offline import switch_off
from koff_lightning.support.quick_imports import quick_imports
from koff_lightning.support.secrets import without_secrets
from koff_lightning.support.streams import is_full, make_printable, nobody_reads
from koff_lightning.support.threads import wait_asleep
from koff_lightning.support.wording import nearest

TRAINING = {
    "fit": "learn the mask and the memories (--dry-run: show budget and text, two steps, write nothing)",
    "validate": "score a checkpoint on the held-out text",
    "test": "score a checkpoint on the held-out text and report",
    "predict": "write a checkpoint's predictions",
    "prepare": "tokenise a run's text once, or --prefetch-only for a machine without network",
    "baseline": "make a one-shot mask to compare with: magnitude, Wanda-sp, FLAP, Fisher or random",
}
# verb -> (our module:function, help); the function's typed arguments and docstring become the verb's options and help.
# A verb of two words is typed as two: koff memory list
TOOLS = {
    "export": (
        "commands.export_cli:export_checkpoint",
        "write a checkpoint as a smaller model and its memories",
    ),
    "convert gguf": ("commands.convert_cli:gguf", "write an exported model as GGUF files for llama.cpp"),
    "generate": ("commands.generate:generate", "continue prompts with a domain's memory"),
    "chat": ("commands.chat:chat", "talk to an exported chat model, switching domains at will"),
    "serve": ("commands.serve:serve", "serve an exported model by OpenAI's protocol, a domain per request"),
    "inspect": (
        "commands.inspection:inspect",
        "sizes, sparsity by layer and domains of an exported model",
    ),
    "memory list": ("commands.memory_cli:list_memories", "list the memories of an exported model"),
    "memory add": ("commands.memory_cli:add", "add a memory trained for the same backbone"),
    "memory remove": ("commands.memory_cli:remove", "remove a memory"),
    "memory compose": ("commands.memory_cli:compose", "make one memory of two (an experiment)"),
    "memory cartridge": (
        "commands.memory_cli:cartridge",
        "exchange a KV memory with PEFT's CARTRIDGE format",
    ),
    "router fit": ("commands.router_cli:fit", "train what picks a memory from the text, into an exported model"),
    "router test": ("commands.router_cli:test", "test how well the router picks, on held-out and unseen text"),
    "bench serve": (
        "commands.serving_bench:bench_serving",
        "time pruned models and memories against the dense",
    ),
    "claims": ("commands.claims:claims", "run KOFF and its controls, and judge the paper's claims"),
    "reproduce": (
        "commands.reproduce:reproduce",
        "run the rows of the paper's tables, and set ours beside the paper's",
    ),
    "analyze": (
        "commands.analyze:analyze",
        "study which neurons left, whom they served, and what the memories hold",
    ),
    "lm-eval": (
        "commands.lm_eval_cli:lm_eval",
        "score a model on lm-eval's tasks, under each of its domains",
    ),
    "plan": ("commands.plan:plan", "estimate memory per GPU and hours of a run, from its config alone"),
    "doctor": ("commands.doctor:doctor", "look at versions, devices, processes, caches and switches"),
    "configs": ("commands.parsing.config_files:list_configs", "list the configs that ship with the package"),
    "push": ("commands.hub_cli:push", "upload an exported model to the hub, or some of its memories"),
    "pull": ("commands.hub_cli:pull", "download an exported model from the hub, whole or in part"),
    "fetch": ("commands.fetch:fetch", "download a small real model: koff fetch smollm2"),
}
# What the system answers where a file cannot be used, and what to do then.
REFUSED = dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "correct its rights, or run as who may")
REFUSED |= {errno.ENAMETOOLONG: "give a shorter name"}
TAKE_CONFIGS = (*TRAINING, "plan", "claims", "reproduce")


def main(argv: list[str] | None = None, **classes: type) -> int:
    """Run `koff` and return the exit status: 0 done, 2 bad input, 128 plus the signal's number where one has ended it.

    Args:
        argv: The words after `koff`; by default those of the process.
        classes: Your own subclasses for the training verbs: `module` of KOFFModule, `data` of DomainDataModule. Their
            arguments become options of `model` and `data`.
    """
    argv = sys.argv[1:] if argv is None else argv
    wait_asleep()
    make_printable()
    try:
        with ended_by(tuple(number for number in SIGNALS if number != signal.SIGINT)):  # Python has that one
            status = _run(argv, classes)
            sys.stdout.flush()
            return status
    except BrokenPipeError:
        if not nobody_reads():
            raise
        return 141  # as where SIGPIPE ends a process
    except KoffError as error:
        print(f"koff: {without_secrets(str(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print(f"koff: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + signal.SIGINT
    except Ended as stop:
        print(f"koff: {stop}", file=sys.stderr)
        return stop.code
    except SystemExit as stop:  # a parser that has printed its help, or rich where nobody reads
        return 141 if isinstance(stop.__context__, BrokenPipeError) else int(stop.code or 0)
    except OSError as error:
        if is_full(error):
            place = error.filename or "what is printed, or a file"
            print(f"koff: cannot write {place}: {error.strerror}; make room, then run it again", file=sys.stderr)
        elif error.filename and error.errno in REFUSED:
            advice = REFUSED[error.errno]
            print(f"koff: cannot read or write {error.filename}: {error.strerror}; {advice}", file=sys.stderr)
        else:
            raise
        return 2
    except BaseException as error:
        if str(error) == "Could not determine home directory.":  # Python's RuntimeError
            print("koff: a path begins with ~, but there is no such home folder: write it in full", file=sys.stderr)
            return 2
        if type(error).__name__ != "PanicException":  # of a library in Rust, which is no Exception
            raise
        reason = " ".join(str(error).split())[:200]
        print(f"koff: a tokenizer cannot be used, it failed in the middle of a text ({reason})", file=sys.stderr)
        return 2


def usage() -> str:
    """The help of `koff` itself."""
    verbs = TRAINING | {verb: text for verb, (_, text) in TOOLS.items()}
    width = max(map(len, verbs)) + 2
    lines = [f"  {verb:<{width}}{text}" for verb, text in verbs.items()]
    return "\n".join(
        [
            "usage: koff VERB [options]      koff VERB --help tells the options of a verb",
            "",
            "Knowledge offloading for frozen LLMs: a smaller shared backbone and one memory per domain.",
            "",
            *lines,
            "",
            "--offline with any of them: no network; what a run needs and is not here is listed at once",
            "start with: koff fit demo.yaml",
        ]
    )


def _run(argv: list[str], classes: dict[str, type]) -> int:
    if "--offline" in argv:  # before the imports: libraries read their switches then
        switch_off()
        argv = [word for word in argv if word != "--offline"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if argv else 2
    two = " ".join(argv[:2])
    verb = two if two in TOOLS else argv[0]
    if verb == "--version":
        print(f"koff-lightning {__version__}")
    elif verb in TRAINING or verb in TOOLS:
        _run_verb(verb, argv[len(verb.split()) :], classes)
    elif kin := [tool for tool in TOOLS if tool.startswith(f"{verb} ")]:
        if argv[1:] not in ([], ["-h"], ["--help"]):
            raise KoffError(f"no verb {two!r}.{nearest(two, kin)} There are: koff {', koff '.join(kin)}")
        print("\n".join(f"koff {tool:<20}{TOOLS[tool][1]}" for tool in kin))
        return 0 if argv[1:] else 2
    elif later := [word for word in argv if word in TRAINING or word in TOOLS]:
        raise KoffError(f"the verb comes first: koff {later[0]} {' '.join(w for w in argv if w != later[0])}")
    else:
        raise KoffError(f"no verb {verb!r}.{nearest(verb, [*TRAINING, *TOOLS])} `koff --help` lists them")
    return 0


def _run_verb(verb: str, words: list[str], classes: dict[str, type]) -> None:
    """Look at the words, which is quick; then import what the verb needs, which may take seconds, and run it."""
    from koff_lightning.commands.parsing import option_table

    if any(option.startswith("error") for option in sys.warnoptions):  # PYTHONWARNINGS=error
        warnings.simplefilter("default")  # libraries warn each other's developers: that is shown, and ends nothing
    words = _with_names(verb, words)
    if option_table.knows(verb) and not classes:  # which have options of their own
        if option_table.wants_help(words):
            print(option_table.help_text(verb))
            return
        from koff_lightning.commands.parsing.first_look import look  # which help does without

        look(verb, words)
    keep_freed()
    if verb in TOOLS:
        _run_tool(verb, words)
        return
    watch_the_launcher()
    if sys.stderr.isatty():
        print("loading torch and Lightning", file=sys.stderr, flush=True)
    with quick_imports():
        from koff_lightning.commands.training_cli import run  # 4 s of imports

    run([verb, *words], **classes)


def _with_names(verb: str, words: list[str]) -> list[str]:
    """Give the words that stand for an option of one name that name: `koff fit demo.yaml`, `koff configs demo.yaml`."""
    if verb == "configs" and words and not words[0].startswith("-"):
        return ["--name", *words]
    named: list[str] = []
    while verb in TAKE_CONFIGS and words and words[0].endswith((".yaml", ".yml")) and words[0][0] != "-":
        named += ["--config", words[0]]
        words = words[1:]
    return [*named, *words]


def _run_tool(verb: str, argv: list[str]) -> None:
    """Parse the verb's options from its function's signature and call it."""
    from koff_lightning.commands.parsing.tool_options import parse

    module, function = TOOLS[verb][0].split(":")
    with quick_imports():
        run = getattr(import_module(f"koff_lightning.{module}"), function)
    run(**parse(verb, run, argv))
