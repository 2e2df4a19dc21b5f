"""Programs in the sandbox: what they can do, and what is kept out."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import time

import pytest

from polgrad.environments import sandbox, toolbox

NAMESPACES = (
  shutil.which('unshare')
  and not subprocess.run(
    [
      'unshare',
      *(() if os.geteuid() == 0 else ('--user', '--map-root-user')),
      '--net',
      '--mount',
      'true',
    ],
    capture_output=True,
  ).returncode
)
needs_namespaces = pytest.mark.skipif(not NAMESPACES, reason='no namespaces on this machine')
BOTH = [pytest.param('namespaces', marks=needs_namespaces), 'limits']


def run(code, isolation='namespaces', timeout_s=5.0, memory_gib=1.0):
  return sandbox.run(code, timeout_s=timeout_s, memory_gib=memory_gib, isolation=isolation)


@pytest.mark.parametrize('isolation', BOTH)
def test_a_program_prints_and_its_last_value_is_shown(isolation):
  assert run('x = 3\nprint("a é")\nx * 2', isolation) == ('a é\n6\n', '')


@pytest.mark.parametrize('isolation', BOTH)
def test_an_exception_is_shown_without_the_frames_of_the_runner(isolation):
  ran = run('print(1)\n1 / 0', isolation)
  assert ran.error == 'the program failed'
  assert ran.output.startswith('1\nTraceback') and ran.output.endswith('division by zero\n')
  assert ran.output.count('File') == 1


# Each prints its name if it succeeds.
ATTACKS = """
import os, socket, sys
def reads(): return open('FILE').read()
def network(): socket.create_connection(('127.0.0.1', PORT), 1)
def writes(): open(sys.prefix + '/polgrad_was_here', 'w')
def variable(): return os.environ['SECRET']
def kills(): os.kill(PARENT, 0)
def memory(): return bytearray(2**33)
for attack in (reads, network, writes, variable, kills, memory):
  try: print(attack.__name__, attack() and '')
  except (OSError, KeyError, MemoryError): pass
"""
# What the module says that `limits` do not keep out.
OPEN = {'namespaces': '', 'limits': 'reads \n'}


@pytest.mark.parametrize('isolation', BOTH)
def test_attacks_are_kept_out(isolation, tmp_path, monkeypatch):
  monkeypatch.setenv('SECRET', 'secret')
  (tmp_path / 'file').write_text('secret')
  with socket.create_server(('127.0.0.1', 0)) as server:
    given = {'PORT': server.getsockname()[1], 'FILE': tmp_path / 'file', 'PARENT': os.getpid()}
    code = ATTACKS
    for name, value in given.items():
      code = code.replace(name, str(value))
    assert run(code, isolation) == (OPEN[isolation], '')
    server.settimeout(0.01)
    with pytest.raises(TimeoutError):
      server.accept()


@pytest.mark.parametrize(
  ('code', 'why'),
  [
    ('while True: print("x" * 1000)', 'more than 1000000 bytes of output'),
    ('import os\nos._exit(7)', 'the program failed'),
    ('import os\nos.abort()', 'the program failed'),
  ],
)
def test_a_program_that_ends_in_another_way_is_an_error(code, why):
  assert run(code, 'limits').error == why


@pytest.mark.parametrize('isolation', BOTH)
def test_a_program_that_does_not_end_is_killed(isolation):
  begin = time.monotonic()
  ran = run('print(1, flush=True)\nwhile True: pass', isolation, timeout_s=0.5)
  assert ran == ('1\n', 'no end within 0.5 s') and time.monotonic() - begin < 5


@needs_namespaces
def test_what_a_program_started_dies_with_it():
  mark = f'polgrad-{os.getpid()}'
  code = (
    'import os, sys, time\n'
    'if not os.fork():\n'
    '  os.setsid()\n'
    f'  os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(99)", "{mark}"])\n'
    'time.sleep(0.3)\nprint("started")'
  )
  assert run(code).output == 'started\n'
  commands = [p.read_bytes() for p in pathlib.Path('/proc').glob('[0-9]*/cmdline') if p.exists()]
  assert not [c for c in commands if mark.encode() in c]


@needs_namespaces
def test_processes_are_counted():
  code = (
    'import os, time\n'
    'n = 0\n'
    'try:\n'
    '  while n < 500:\n'
    '    if not os.fork():\n'
    '      time.sleep(5); os._exit(0)\n'
    '    n += 1\n'
    'except OSError:\n'
    '  pass\n'
    'print(n < 200)'
  )
  assert run(code).output == 'True\n'


@needs_namespaces
def test_a_program_sees_itself_alone_and_writes_in_memory(tmp_path):
  (tmp_path / 'secret').write_text('a')
  ran = run(
    'import os\n'
    'open("/tmp/polgrad_x", "w").write("a")\n'
    'print("polgrad_x" in os.listdir("/tmp"), os.path.exists("/home"), os.getpid() < 10)\n'
    f'print(os.path.exists({str(tmp_path / "secret")!r}))\n'
    'print(open("/proc/self/status").read().split("CapEff:")[1].split()[0])'
  )
  assert ran.output == 'True False True\nFalse\n0000000000000000\n'
  assert not pathlib.Path('/tmp/polgrad_x').exists()


@pytest.mark.parametrize('isolation', BOTH)
def test_programs_share_one_folder_and_leave_nothing_in_it(isolation, tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  run('open("here", "w").write("x")', isolation)
  assert [str(path) for path in tmp_path.rglob('*')] == [sandbox.empty_folder()]


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(sandbox.tempfile, 'tempdir', str(tmp_path))
  pathlib.Path(sandbox.empty_folder()).rename(tmp_path / 'other')
  (tmp_path / f'polgrad-sandbox-{os.geteuid()}').symlink_to(tmp_path / 'other')
  with pytest.raises(
    RuntimeError, match='belongs to another user; name another folder with TMPDIR'
  ):
    sandbox.empty_folder()


def test_the_tool_tells_what_went_wrong():
  tool = toolbox.Python(isolation='limits', characters=100)
  assert tool('print(2)') == '2' and tool('x = 1') == 'no output'
  with pytest.raises(ValueError, match=r'(?s)the program failed.*ZeroDivisionError'):
    tool('1 / 0')
  long = tool('print("ab" * 500)')
  assert re.fullmatch(r'(ab){25} \[\.\.\.\] (ab){25}', long)


def test_a_machine_without_namespaces_is_refused(monkeypatch):
  monkeypatch.setattr(sandbox, 'NAMESPACES', ('--no-such-option',))
  with pytest.raises(RuntimeError, match="'limits' is no sandbox"):
    toolbox.Python().prepare()
