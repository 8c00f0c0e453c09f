"""Fresh processes without the seconds of torch and transformers: forks of one interpreter that has imported these.

``python warm.py SOCKET PACKAGE ...`` is the interpreter: a request on the socket is a Python file, its arguments, its
folder and its environment.
"""

import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

PACKAGES = ("torch", "transformers.trainer", "pandas", "scipy.stats", "scipy.optimize", "matplotlib.figure", "joblib")


@contextmanager
def interpreter(*packages):
    """The socket of an interpreter that has imported ``PACKAGES`` and these, but not qlens."""
    with tempfile.TemporaryDirectory() as folder:
        place = os.path.join(folder, "socket")
        command = [sys.executable, "-I", __file__, place, *PACKAGES, *packages]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout.readline() == "ready\n", "the interpreter ended"
                yield place
            finally:
                server.kill()


def run(place, code, folder):
    """Run code in a fork, in a folder that is its first place of imports: (exit code, output, errors)."""
    with tempfile.TemporaryDirectory() as files, socket.socket(socket.AF_UNIX) as server:
        file = Path(files, "code.py")
        file.write_text(code)
        server.connect(place)
        server.sendall(json.dumps([str(file), [], str(folder), dict(os.environ)]).encode() + b"\n")
        return json.loads(server.makefile().readline())


def kernel(place, root, folder):
    """Write a Jupyter kernel of the name "warm", which runs in a fork and imports qlens from ``root``, below a folder."""
    spec_folder = Path(folder, "kernels", "warm")
    spec_folder.mkdir(parents=True)
    kernel_file, client_file = spec_folder / "kernel.py", spec_folder / "client.py"
    kernel_file.write_text(f"""
import sys
from ipykernel.kernelapp import launch_new_instance
sys.path[0] = {str(root)!r}
launch_new_instance()
""")
    client_file.write_text(f"""
import json, os, socket, sys
environment = {{name: value for name, value in os.environ.items() if name != "JPY_PARENT_PID"}}
with socket.socket(socket.AF_UNIX) as server:
    server.connect({place!r})
    request = [{str(kernel_file)!r}, ["-f", sys.argv[1]], os.getcwd(), environment]
    server.sendall(json.dumps(request).encode() + b"\\n")
    status, _, errors = json.loads(server.makefile().readline())
sys.exit(errors if status else 0)
""")
    command = [sys.executable, "-I", str(client_file), "{connection_file}"]
    spec = {"argv": command, "display_name": "warm", "language": "python"}
    (spec_folder / "kernel.json").write_text(json.dumps(spec))


def _serve(place):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(place)
        server.listen()
        print("ready", flush=True)
        while True:
            client, _ = server.accept()
            with client, client.makefile() as request:
                _answer(client, *json.loads(request.readline()))


def _answer(client, file, arguments, folder, environment):
    """Run a request in a fork, which is killed if the client leaves."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = os.fork()
        if not child:
            _work(file, arguments, folder, environment, output, errors)
        ended, status = 0, 0
        while not ended:
            if select.select([client], [], [], 0.02)[0]:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
        texts = []
        for stream in (output, errors):
            stream.seek(0)
            texts.append(stream.read().decode())
        try:
            client.sendall(json.dumps([os.waitstatus_to_exitcode(status), *texts]).encode() + b"\n")
        except BrokenPipeError:
            return  # the client has left


def _work(file, arguments, folder, environment, output, errors):
    """The fork: it never returns."""
    status = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(errors.fileno(), 2)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(folder)
        sys.path[0], sys.argv[1:] = folder, arguments
        runpy.run_path(file, run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(bool(end.code))
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    sys.path.insert(0, "")  # replaced by the folder of a request
    for package in sys.argv[2:]:
        importlib.import_module(package)
    assert not any(name.partition(".")[0] == "qlens" for name in sys.modules)
    _serve(sys.argv[1])
