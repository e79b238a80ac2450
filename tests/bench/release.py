#!/usr/bin/env python3
"""How long does a lock outlive its reason, and how late does a waiter hear of a release?

Takes the program's path and prints, over several runs each, the median and the longest time: from SIGKILL of `hold`, from
the closing of its terminal, from its deadline while nobody reads its terminal, until the bytes are free; and from a
release until `wait` has ended. Ends with 1 if one of them is over its budget (1 s, and 200 ms for `wait`).

    cargo build --release && python3 tests/bench/release.py target/release/qlock-top
"""
import fcntl, os, pty, signal, statistics, struct, subprocess, sys, tempfile, time

PROGRAM = os.path.abspath(sys.argv[1])
RUNS = int(sys.argv[2]) if len(sys.argv) > 2 else 20
FLOCK = struct.Struct("hhqqi4x")


def is_free(path):
    """Asks as any stranger does; takes no lock."""
    with open(path, "rb") as image:
        question = FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 100, 105, 0)
        answer = fcntl.fcntl(image, fcntl.F_GETLK, question)
        return FLOCK.unpack(answer)[0] == fcntl.F_UNLCK


def until(condition, what):
    start = time.monotonic()
    while not condition():
        if time.monotonic() - start > 30:
            sys.exit(f"waited in vain for {what}")
    return time.monotonic() - start


def hold(path, *options, terminal=None):
    out = terminal if terminal is not None else subprocess.PIPE
    child = subprocess.Popen(
        [PROGRAM, "hold", path, "--as", "vm", *options],
        stdin=subprocess.DEVNULL if terminal is None else terminal, stdout=out, start_new_session=True,
    )
    until(lambda: not is_free(path), "the lock")
    return child


def killed(path):
    child = hold(path)
    child.send_signal(signal.SIGKILL)
    took = until(lambda: is_free(path), "the end of a killed holder")
    child.wait()
    return took


def terminal_closed(path):
    pid, master = pty.fork()
    if pid == 0:
        os.execv(PROGRAM, [PROGRAM, "hold", path, "--as", "vm"])
    until(lambda: not is_free(path), "the lock")
    start = time.monotonic()
    os.close(master)
    until(lambda: is_free(path), "the end after a hangup")
    took = time.monotonic() - start
    os.waitpid(pid, 0)
    return took


def deadline_unread(path):
    master, slave = pty.openpty()
    # Full before it starts, so that its first line already waits for a reader.
    os.set_blocking(slave, False)
    try:
        while True:
            os.write(slave, b"x" * 4096)
    except BlockingIOError:
        pass
    os.set_blocking(slave, True)
    child = hold(path, "--timeout", "200ms", terminal=slave)
    took = until(lambda: is_free(path), "the deadline") - 0.2
    child.kill()
    child.wait()
    os.close(master)
    os.close(slave)
    return max(took, 0.0)


def waiter(path):
    holder = hold(path)
    child = subprocess.Popen([PROGRAM, "wait", path, "--as", "vm"])
    time.sleep(0.1)
    holder.kill()
    until(lambda: is_free(path), "the release")
    start = time.monotonic()
    assert child.wait() == 0
    holder.wait()
    return time.monotonic() - start


def main():
    failed = False
    with tempfile.TemporaryDirectory(prefix="qlock-bench-") as directory:
        path = os.path.join(directory, "a.raw")
        with open(path, "wb") as image:
            image.truncate(1 << 20)
        for name, measure, budget in [
            ("killed", killed, 1.0),
            ("terminal closed", terminal_closed, 1.0),
            ("deadline, terminal not read", deadline_unread, 1.0),
            ("wait, after the release", waiter, 0.2),
        ]:
            times = [measure(path) for _ in range(RUNS)]
            over = max(times) > budget
            failed |= over
            print(f"{name:<28} median {statistics.median(times) * 1000:6.1f} ms   longest {max(times) * 1000:6.1f} ms"
                  f"   budget {budget * 1000:.0f} ms{'   OVER' if over else ''}")
    sys.exit(1 if failed else 0)


main()
