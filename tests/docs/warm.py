"""Fresh imports without the seconds of torch and transformers: forks of one interpreter that has imported these already."""

import json
import subprocess
import sys
from contextlib import contextmanager

PACKAGES = ("torch", "transformers.trainer", "pandas", "scipy.stats", "scipy.optimize", "matplotlib.figure", "joblib")
SERVER = """
import importlib, json, os, sys, tempfile
for package in sys.argv[1:]:
    importlib.import_module(package)
assert not any(name.partition(".")[0] == "qlens" for name in sys.modules)
for line in sys.stdin:
    code, folder = json.loads(line)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            sys.path.insert(0, folder)
            status = 1
            try:
                exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
                status = 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        print(json.dumps([status, out.read().decode(), err.read().decode()]), flush=True)
"""


@contextmanager
def interpreter():
    """A function that runs code in an interpreter without qlens, in which the folder is the first place of imports.

    The function takes the code and the folder, and returns (exit code, output, errors).
    """
    command = [sys.executable, "-I", "-c", SERVER, *PACKAGES]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:

        def run(code, folder):
            print(json.dumps([code, str(folder)]), file=server.stdin, flush=True)
            answer = server.stdout.readline()
            assert answer, "the interpreter ended"
            return json.loads(answer)

        yield run
        server.stdin.close()
