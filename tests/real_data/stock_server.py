"""Runs programs of transformers alone, each in a fork of this process, which has the imports done.

A line of standard input is a request, {"program", "words", "lines"}: source, its arguments and its input. A line of
standard output is the answer, {"status", "output", "error"}.
"""

import json
import os
import sys
import tempfile
import traceback
from typing import Any

import torch
import transformers.pipelines


def run(request: dict[str, Any], streams: list[int]) -> None:
    """Runs a program in this process, with these files for its standard streams, and ends it."""
    status = 1
    try:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        sys.stdin, sys.stdout, sys.stderr = (open(n, "r" if n == 0 else "w", closefd=False) for n in range(3))
        sys.argv = ["program", *request["words"]]
        exec(compile(request["program"], "program", "exec"), {"__name__": "__main__"})
        assert not any(name.partition(".")[0] == "ticktune" for name in sys.modules)
        status = 0
    finally:
        if error := sys.exception():
            traceback.print_exception(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Answers requests until there are no more."""
    torch.set_num_threads(1)
    assert transformers.pipelines.pipeline
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as error:
            given.write("".join(line + "\n" for line in request["lines"]).encode())
            given.seek(0)
            child = os.fork()
            if child == 0:
                run(request, [stream.fileno() for stream in (given, output, error)])
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            for stream in (output, error):
                stream.seek(0)
            answer = {"status": status, "output": output.read().decode(), "error": error.read().decode()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
