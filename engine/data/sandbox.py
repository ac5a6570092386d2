"""A process of its own that renders a chat template, which came with a model and may be hostile.

A template is a program. jinja2's sandbox keeps it from Python's insides; the kernel keeps it from memory and time: what one
expression can ask for ('a' * 10**10, 10**10**10) no check from within could stop. `chat_template.render` starts this file by
its path, writes {"path", "template", "names", "conversations"} to its standard input and reads {"texts"}, {"refused"} or
{"error"} from its standard output. It imports nothing of the engine.
"""

import json
import resource
import sys

MEMORY = 512 << 20  # bytes of address space
CPU_S = 1
TEXT = 1 << 17  # characters of a rendered conversation


def main() -> None:
    request = json.load(sys.stdin)
    for what, limit in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, CPU_S), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(what)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(what, (limit, limit))
    sys.path[:] = request["path"]
    try:
        from jinja2.exceptions import SecurityError, TemplateError
    except ImportError as error:
        json.dump({"error": str(error)}, sys.stdout)
        return
    try:
        template = environment().from_string(request["template"])
        texts = []
        for conversation in request["conversations"]:
            texts.append(template.render(**request["names"], **conversation))
            texts[-1].encode()  # half a character (a lone surrogate) is no text
            if len(texts[-1]) > TEXT:
                raise MemoryError
        answer = {"texts": texts}
    except MemoryError:
        answer = {"refused": "it asks for too much memory or text"}
    except (SecurityError, RecursionError, OverflowError) as error:
        answer = {"refused": f"{error}"}
    except TemplateError as error:
        answer = {"error": f"{error}"}
    except Exception as error:  # a template can fail in as many ways as a program
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


def environment():
    """What transformers gives to templates, but no clock: `strftime_now` is not defined, so templates that ask for it take their fixed date."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: marks the assistant's text; what is within is rendered as it stands."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made


if __name__ == "__main__":
    main()
