#!/usr/bin/env python3
"""What does qlock-top cost on a large host, and what do its peers cost there?

Makes a population (tests/bench/population.rs), measures qlock-top and lsof, fuser and lslocks on it in one run, and
prints one table with medians, ratios and budgets. Ends with 1 if a budget is missed, with 2 if it could not measure.

    tests/bench/compare.sh [SECTION..] [OPTIONS]

Sections, all of them unless some are named:
    list      one cold `list --format json` beside one run of each peer, and whether every holder is named
    tick      CPU of `watch` on a quiet population beside lslocks once a second
    syscalls  what one tick asks of the kernel, in all and per image
    memory    of `watch` and of the dashboard after a while
    screen    the dashboard: time to the first images, bytes while nothing changes and for a changed row
    delay     from a lock taken or dropped by qemu-io to the line of `watch`
    churn     memory, descriptors and threads while holders come and go

The environment names the two programs, QLOCK_TOP and POPULATION, and where the images are made, TMPDIR (/var/tmp).
Run it as root, on a machine with nothing else to do: other processes are part of what is searched. Budgets of time are
meant for 1,000 images and 2,000 processes, and are not judged beyond.
"""
import argparse, collections, contextlib, ctypes, fcntl, json, math, os, pty, random, re, resource, select, shutil
import signal, statistics, struct, subprocess, sys, tempfile, termios, threading, time

SECTIONS = ["list", "tick", "syscalls", "memory", "screen", "delay", "churn"]
QLOCK_TOP = os.environ.get("QLOCK_TOP", "target/release/qlock-top")
POPULATION = os.environ.get("POPULATION", "target/release/examples/population")

RATIO = 5  # Peers take at least so many times as long.
LSLOCKS_NAMES_OFD = (2, 40)  # The first version that looks for the holders, and so the first that can be compared.
TICK_MS = 10.0
CALLS_PER_FREE_IMAGE = 4
FIRST_SCREEN_MS = 150.0
ROW_BYTES = 300
DELAY_P50_MS, DELAY_P99_MS = 30.0, 100.0

SETTLE = 5.0  # After its first look a program still starts threads and fills caches.
HINT_SECONDS = 8.0  # Long enough for some dozens of them.
DEADLINE = 5.0  # A change that is not told by then is lost.
FLOCK = struct.Struct("hhqqi4x")
F_OFD_SETLK = 37
IMAGE_NAME = re.compile(rb"vm-\d{5}\.(?:raw|qcow2)")


class Failure(Exception):
    """It cannot be measured, and why."""


# What is started, and how it ends.


LIBC = ctypes.CDLL(None)


def tie():
    """In a child: ends with us, even if we are killed outright (PR_SET_PDEATHSIG)."""
    LIBC.prctl(1, signal.SIGTERM)


def end(process, *signals, patience=10):
    """Ends a process that we started, gently first."""
    for number in (*signals, signal.SIGKILL):
        if process.poll() is not None:
            break
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(OSError):
                stream.close()


@contextlib.contextmanager
def started(argv, **options):
    """A program that runs as long as the block; a session of its own, so that Ctrl-C reaches us alone."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL} | options
    process = subprocess.Popen(argv, start_new_session=True, preexec_fn=tie, **options)
    try:
        yield process
    finally:
        end(process, signal.SIGTERM)


def run(argv, out=subprocess.DEVNULL):
    """Runs a program to its end: wall seconds, CPU seconds, exit status."""
    start = time.perf_counter()
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        end(process, signal.SIGTERM)
    return wall, usage.ru_utime + usage.ru_stime, process.returncode


class Sizes(collections.namedtuple("Sizes", "images holders processes descriptors")):
    """Of a population."""

    def with_fewer_holders(self):
        """As many holders as before, but at most half of the images and of the processes."""
        return self._replace(holders=min(self.holders, self.images // 2, self.processes // 2))


class Population:
    """Images and processes as the options say, until the block ends."""

    def __init__(self, directory, sizes, churn=0):
        self.directory, self.sizes, self.churn = os.path.join(directory, "images"), sizes, churn

    def __enter__(self):
        s = self.sizes
        note(f"population: {s.images} images, {s.holders} held, {s.processes} processes of {s.descriptors} descriptors"
             + (f", {self.churn} replaced a second" if self.churn else ""))
        self.process = subprocess.Popen(
            [POPULATION, self.directory, "--images", str(s.images), "--holders", str(s.holders),
             "--processes", str(s.processes), "--descriptors", str(s.descriptors), "--churn", str(self.churn)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )
        try:
            if not self.process.stdout.readline().startswith(b"standing:"):
                raise Failure("the population does not stand")
        except BaseException:
            self.__exit__()
            raise
        self.names = sorted(os.listdir(self.directory))
        self.held, self.free = self.names[:s.holders], self.names[s.holders:]
        return self

    def __exit__(self, *_):
        """It ends with its input, and then waits for all its members."""
        self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(120)
        end(self.process, signal.SIGTERM)

    def path(self, name):
        return os.path.join(self.directory, name)


class Terminal:
    """The dashboard in a terminal of 120x40 that answers nothing."""

    def __init__(self, population):
        self.argv = [QLOCK_TOP, population.directory]

    def __enter__(self):
        self.start = time.perf_counter()
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            try:
                tie()
                signal.signal(signal.SIGPIPE, signal.SIG_DFL)
                fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
                os.execve(self.argv[0], self.argv, os.environ | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"})
            finally:
                os._exit(127)
        return self

    def __exit__(self, *_):
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)
            deadline = time.monotonic() + 5
            while time.monotonic() < deadline:
                # What it writes at its end must be read, or it waits.
                with contextlib.suppress(Failure):
                    self.read(0.02)
                if os.waitpid(self.pid, os.WNOHANG)[0]:
                    os.close(self.master)
                    return

    def read(self, timeout):
        """What it wrote, at most 4 KiB at once; nothing if it is quiet for so long."""
        if not select.select([self.master], [], [], timeout)[0]:
            return b""
        try:
            return os.read(self.master, 1 << 16)
        except OSError as error:
            raise Failure("the dashboard has ended") from error

    def read_for(self, seconds):
        """The chunks of the next seconds."""
        chunks, deadline = [], time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if chunk := self.read(left):
                chunks.append(chunk)
        return chunks

    def until_quiet(self, quiet, limit=60):
        """The chunks until it has been quiet for so long."""
        chunks, deadline = [], time.monotonic() + limit
        while chunk := self.read(quiet):
            chunks.append(chunk)
            if time.monotonic() > deadline:
                raise Failure(f"the dashboard is not quiet for {quiet} s within {limit} s")
        return chunks


# What is printed.


def note(text):
    print(f"compare: {text}", file=sys.stderr, flush=True)


def ms(seconds):
    return f"{seconds * 1000:.1f} ms"


def mb(size):
    return f"{size / 1e6:.1f} MB"


def spread(seconds):
    """The median, and between what it lies."""
    return f"{ms(statistics.median(seconds))} ({min(seconds) * 1000:.1f} .. {max(seconds) * 1000:.1f})"


def percentile(values, share):
    return sorted(values)[math.ceil(share * len(values)) - 1]


class Table:
    """Figures, each with its ratio, its budget and whether it is kept."""

    def __init__(self):
        self.rows, self.notes, self.missed = [], [], 0

    def title(self, text):
        self.rows.append((text,))

    def row(self, what, value, ratio="", budget="", ok=None):
        self.missed += ok is False
        self.rows.append((f"  {what}", value, ratio, budget, {None: "", True: "ok", False: "over"}[ok]))

    def note(self, text):
        self.notes.append(text)

    def print(self):
        head = ("", "median", "ratio", "budget", "")
        full = [head, *(row for row in self.rows if len(row) > 1)]
        widths = [max(len(row[i]) for row in full) for i in range(len(head))]
        for row in [head, *self.rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        for text in self.notes:
            print(f"* {text}")


# What is measured.


def cpu(pid):
    """CPU seconds of a whole process, to the nanosecond, with those of its threads that have ended: by its clock
    (clock_getcpuclockid(3)), because /proc/PID/stat counts in hundredths of a second."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def memory(pid):
    """VmRSS, RssAnon and VmHWM in bytes."""
    with open(f"/proc/{pid}/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return {name: int(lines[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon", "VmHWM")}


def memory_words(m):
    return f"{mb(m['VmRSS'])} (anonymous {mb(m['RssAnon'])}, peak {mb(m['VmHWM'])})"


def memory_budget(images):
    return (12e6 if images <= 1000 else 40e6) if images <= 10_000 else None


def is_nominal(sizes):
    """Whether the budgets of time are meant for this size."""
    return sizes.images <= 1000 and sizes.processes <= 2000


def limited(value, limit):
    """A budget and whether it is kept, if there is one."""
    return None if limit is None else value <= limit


def watch_command(population, interval):
    return [QLOCK_TOP, "watch", "--interval", interval, "--format", "ndjson", population.directory]


def list_once(population):
    """One cold run: wall, CPU, how many images have every holder named, and the pairs of pid and image."""
    # Memory, so that no disk is measured, and no reader at the other end of a pipe.
    with open(os.memfd_create("list"), "w+b") as out:
        wall, used, status = run([QLOCK_TOP, "list", "--format", "json", population.directory], out)
        # 1 is "held", 3 "not whole": some process of a host is always hidden.
        if status not in (0, 1, 3):
            raise Failure(f"list ended with {status}")
        out.seek(0)
        snapshot = json.load(out)
    holders = {(holder["pid"], image["path"]) for image in snapshot["images"] for holder in image["holders"]}
    return wall, used, holders_named(population, snapshot), holders


def holders_named(population, snapshot):
    """How many of the images that are held are told so, with a holder for each byte that is locked."""
    images = {os.path.basename(image["path"]): image for image in snapshot["images"]}
    if sorted(images) != population.names:
        raise Failure(f"list shows {len(images)} of {len(population.names)} images")

    def whole(image):
        locked = [byte for byte in image["bytes"] if byte["state"] != "free"]
        return image["verdict"] == "held" and locked and all(byte["holders"] for byte in locked)

    return sum(bool(whole(images[name])) for name in population.held)


def lslocks_version():
    text = subprocess.run(["lslocks", "--version"], capture_output=True, text=True).stdout
    found = re.search(r"(\d+)\.(\d+)\S*", text)
    return ((int(found[1]), int(found[2])), found[0]) if found else ((0, 0), "?")


def named_by_lslocks(holders):
    """How many of the holders that qlock-top names lslocks shows with their images."""
    argv = ["lslocks", "--noheadings", "--raw", "--notruncate", "--output", "PID,PATH"]
    shown = set()
    for line in subprocess.run(argv, capture_output=True, text=True).stdout.splitlines():
        pid, _, path = line.partition(" ")
        if pid.isdigit():
            shown.add((int(pid), path))
    return len(holders & shown)


def measure_list(table, population, options):
    paths = [population.path(name) for name in population.names]
    peers = {"lsof +D DIR": ["lsof", "+D", population.directory], "fuser DIR/*": ["fuser", *paths],
             "lslocks": ["lslocks"]}
    present = {name: argv for name, argv in peers.items() if shutil.which(argv[0])}
    for name in peers.keys() - present.keys():
        table.note(f"{name.split()[0]} is not installed: not compared.")
    version, version_words = lslocks_version() if "lslocks" in present else ((0, 0), "")

    own, times = [], collections.defaultdict(list)
    list_once(population)
    # By turns, so that whatever else the machine does meets all of them.
    for i in range(options.runs):
        own.append(list_once(population))
        for name, argv in present.items():
            if i < options.peer_runs:
                note(f"list: {name} {i + 1}/{options.peer_runs}")
                times[name].append(run(argv))

    walls, used, named, holders = zip(*own)
    wall, named = statistics.median(walls), min(named)
    table.title("list")
    table.row("qlock-top list --format json DIR", spread(walls))
    table.row("  CPU", spread(used))
    whole = named == len(population.held)
    table.row("  held images with every holder named", str(named), "", f"{len(population.held)}", whole)
    for name, runs in times.items():
        ratio = statistics.median(w for w, _, _ in runs) / wall
        counts = name != "lslocks" or version >= LSLOCKS_NAMES_OFD
        table.row(f"{name} {version_words if name == 'lslocks' else ''}".rstrip(), spread([w for w, _, _ in runs]),
                  f"{ratio:.1f}x", f">= {RATIO}x" if counts else "", ratio >= RATIO if counts else None)
        table.row("  CPU", spread([c for _, c, _ in runs]))
    if "lslocks" in present:
        table.row("  holders that lslocks names", f"{named_by_lslocks(holders[-1])} of {len(holders[-1])}")
        if version < LSLOCKS_NAMES_OFD:
            table.note(f"lslocks {version_words} does not look for holders of QEMU's locks: its time is no measure.")
    table.note("lsof and fuser show who has an image open, not who holds which byte of it.")


class Watched:
    """A `watch` on a quiet population: CPU seconds a second after it has settled, memory, and lines that it wrote."""

    def __init__(self, population, interval, seconds):
        note(f"watch --interval {interval}: {SETTLE + seconds:.0f} s")
        with tempfile.TemporaryFile(dir=os.path.dirname(population.directory)) as out:
            with started(watch_command(population, interval), stdout=out) as process:
                wait_for_first_line(out, process)
                time.sleep(SETTLE)
                written = os.fstat(out.fileno()).st_size
                start, used = time.monotonic(), cpu(process.pid)
                time.sleep(seconds)
                self.cpu = (cpu(process.pid) - used) / (time.monotonic() - start)
                self.memory = memory(process.pid)
            out.seek(written)
            self.lines = out.read().count(b"\n")


def wait_for_first_line(out, process):
    """Until the present state is in the file."""
    deadline = time.monotonic() + 60
    while (size := os.fstat(out.fileno()).st_size) == 0 or os.pread(out.fileno(), 1, size - 1) != b"\n":
        if process.poll() is not None or time.monotonic() > deadline:
            raise Failure("watch printed no snapshot")
        time.sleep(0.02)


def measure_tick(table, population, options, watched):
    hints = Watched(population, "1h", options.seconds)
    nominal = is_nominal(population.sizes)
    table.title("tick, CPU on a quiet population")
    table.row("qlock-top watch --interval 1s", f"{ms(watched.cpu)} a second", "",
              f"{TICK_MS:.0f} ms" if nominal else "", limited(watched.cpu * 1000, TICK_MS) if nominal else None)
    table.row("  of it hints (--interval 1h)", f"{ms(hints.cpu)} a second")
    table.row("  of it one tick (the difference)", ms(watched.cpu - hints.cpu))
    if watched.lines or hints.lines:
        table.note(f"tick: {watched.lines} and {hints.lines} lines were written: the population was not quiet.")
    if shutil.which("lslocks"):
        used = []
        for _ in range(10):
            begun = time.monotonic()
            used.append(run(["lslocks"])[1])
            time.sleep(max(0.0, 1 - (time.monotonic() - begun)))
        peer = statistics.median(used)
        table.row("lslocks once a second", f"{ms(peer)} a second, {peer * 60:.1f} s a minute",
                  f"{peer / watched.cpu:.1f}x")
        table.row("  qlock-top as well", f"{watched.cpu * 60:.2f} s a minute")


class Call(collections.namedtuple("Call", "at name image about")):
    """A system call: when, which, the image that it touches, and in words what it is about."""

    # Read once a tick, to see whether a process has started or ended.
    TICK = "ticks"

    # `PID TIME NAME(ARGUMENTS`. A call that another thread's interrupts takes two lines, its arguments in the first.
    LINE = re.compile(r"\d+ +(\d+\.\d+) (\w+)\((.*)")
    ABOUT = [(r'open.*"/proc/loadavg"', TICK), (r"/proc/locks", "/proc/locks"),
             (r"/proc/\d+\b", "/proc/PID of holders"), (r"inotify|eventpoll", "events of inotify"),
             (r"^futex", "threads")]

    @classmethod
    def parse(cls, line, directory):
        """The call that a line of strace(1) begins, if it does."""
        if not (found := cls.LINE.match(line)):
            return None
        at, name, arguments = float(found[1]), found[2], found[3]
        image = None
        # An event of inotify names an image as well, but does not touch it.
        if not name.startswith(("read", "write", "epoll")):
            # By path, by a descriptor, or by its name in the directory.
            image = re.search(f'{re.escape(directory)}(?:/|>, ")([^/"<>]+)[">]', arguments)
        words = next((words for pattern, words in cls.ABOUT if re.search(pattern, f"{name}({arguments})")), "other")
        return cls(at, name, image and image[1], "images" if image else words)


def trace(population, interval, enough, limit):
    """The calls of a `watch` until there are enough of them, or the time is up."""
    note(f"strace of watch --interval {interval}")
    log, calls, rest = os.path.join(os.path.dirname(population.directory), "strace.log"), [], ""
    with started(watch_command(population, interval)) as watch:
        time.sleep(SETTLE)
        # Calls are counted, not timed: strace makes them slow.
        with open(log, "w+", errors="replace") as written, started(
            ["strace", "-f", "-y", "-ttt", "-s", "256", "-o", log, "-p", str(watch.pid)]
        ) as strace:
            deadline = time.monotonic() + limit
            while time.monotonic() < deadline and not enough(calls):
                if strace.poll() is not None:
                    raise Failure("strace cannot look at watch")
                time.sleep(0.2)
                *lines, rest = (rest + written.read()).split("\n")
                calls.extend(call for line in lines if (call := Call.parse(line, population.directory)))
            end(strace, signal.SIGINT, patience=30)
    os.remove(log)
    return calls


def traced_ticks(population, ticks):
    """The calls of some ticks, each with the hints that follow it, and the seconds that each took."""

    def bounds(calls):
        return [i for i, call in enumerate(calls) if call.about == Call.TICK]

    calls = trace(population, "1s", lambda calls: len(bounds(calls)) > ticks, 90 + population.sizes.images * 0.01)
    at = bounds(calls)
    if len(at) < 2:
        raise Failure("strace has seen no whole tick")
    return [calls[a:b] for a, b in zip(at, at[1:])], [calls[b].at - calls[a].at for a, b in zip(at, at[1:])]


def per_image(ticks, names):
    """Calls per image and tick: mean, most, and the mean of each kind."""
    names, kinds, counts = set(names), collections.Counter(), collections.Counter()
    for call in (call for tick in ticks for call in tick if call.image in names):
        kinds[call.name] += 1
        counts[call.image] += 1
    each = len(ticks) * len(names)
    words = ", ".join(f"{name} {count / each:.1f}" for name, count in kinds.most_common(6))
    return sum(counts.values()) / each, max(counts.values(), default=0) / len(ticks), words


def measure_syscalls(table, population, options):
    if not shutil.which("strace"):
        table.note("strace is not installed: system calls are not counted.")
        return
    # Where nothing hints at a change, images are asked in turn: a round of all of them takes 5 s.
    ticks, seconds = traced_ticks(population, 10)
    total = statistics.median(map(len, ticks))
    hints = len(trace(population, "1h", lambda _: False, HINT_SECONDS)) / HINT_SECONDS
    table.title("system calls")
    table.row("a tick, with the hints until the next", f"{total:.0f}")
    table.row("  hints alone (--interval 1h)", f"{hints:.0f} a second")
    table.row("  a tick alone (the difference)", f"{total - hints * statistics.median(seconds):.0f}")
    about = collections.Counter(call.about for tick in ticks for call in tick)
    kinds = collections.Counter(call.name for tick in ticks for call in tick)
    for what, counter in ("what about", about), ("which", kinds):
        words = [f"{name} {count / len(ticks):.0f}" for name, count in counter.most_common(8)]
        table.note(f"system calls of a tick, {what}: {', '.join(words)}.")
    if population.free:
        mean, most, words = per_image(ticks, population.free)
        table.row("per free image and tick", f"{mean:.1f}", "", f"{CALLS_PER_FREE_IMAGE}", mean <= CALLS_PER_FREE_IMAGE)
        table.note(f"per free image and tick: {words}; at most {most:.1f}.")
    if population.held:
        mean, most, words = per_image(ticks, population.held)
        table.row("per held image and tick", f"{mean:.1f}", "", f"{CALLS_PER_FREE_IMAGE}", mean <= CALLS_PER_FREE_IMAGE)
        holders = about["/proc/PID of holders"] / len(ticks) / len(population.held)
        words = f"{words}; at most {most:.1f}; beside them {holders:.1f} about its holder"
        table.note(f"per held image and tick: {words}.")


def measure_memory(table, population, options, watched):
    sizes, budget = population.sizes, memory_budget(population.sizes.images)
    words = mb(budget) if budget else ""
    note(f"dashboard: {SETTLE + options.seconds:.0f} s")
    with Terminal(population) as terminal:
        terminal.read_for(SETTLE + options.seconds)
        dashboard = memory(terminal.pid)
    table.title(f"memory after {SETTLE + options.seconds:.0f} s")
    for what, m in ("watch --interval 1s", watched.memory), ("dashboard", dashboard):
        table.row(what, memory_words(m), "", words, limited(m["VmRSS"], budget))


def first_screen(population):
    """Seconds to the first bytes, and to the end of the first frame that names an image."""
    with Terminal(population) as terminal:
        text, first, last = b"", None, None
        while True:
            named = IMAGE_NAME.search(text)
            # A frame is one write, but comes in pieces; one right after the other.
            if not (chunk := terminal.read(0.03 if named else 30)):
                if not named:
                    raise Failure("the dashboard shows no image")
                return first, last
            last = time.perf_counter() - terminal.start
            first = first or last
            text += chunk


def readable(chunks):
    """What was written, with escape sequences seen."""
    text = b"".join(chunks).decode(errors="replace").replace("\x1b", "^[")
    return text if len(text) <= 700 else f"{text[:700]} .. ({len(text)} characters)"


def lock_byte(fd, kind):
    """Takes or drops the lock of who reads along: byte 100, which the others of this population do not deny."""
    fcntl.fcntl(fd, F_OFD_SETLK, FLOCK.pack(kind, os.SEEK_SET, 100, 1, 0))


def changed_rows(terminal, paths):
    """What is written for a second holder of each image, by what happens."""
    taken, dropped, opened = [], [], []
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            # Apart from the lock: what the open alone changes on the screen.
            opened.append(terminal.until_quiet(2.5))
            lock_byte(fd, fcntl.F_RDLCK)
            taken.append(terminal.until_quiet(2.5))
            lock_byte(fd, fcntl.F_UNLCK)
            dropped.append(terminal.until_quiet(2.5))
        finally:
            os.close(fd)
        terminal.until_quiet(2.5)
    return {"an image is opened": opened, "a second holder": taken, "and its release": dropped}


def measure_screen(table, population, options):
    nominal = is_nominal(population.sizes)
    note(f"dashboard: first screen, {options.runs} times")
    screens = [first_screen(population) for _ in range(options.runs)]
    table.title("dashboard, 120x40")
    table.row("first bytes", spread([first for first, _ in screens]))
    named = [last for _, last in screens]
    table.row("first screen with images", spread(named), "", f"{FIRST_SCREEN_MS:.0f} ms" if nominal else "",
              limited(statistics.median(named) * 1000, FIRST_SCREEN_MS) if nominal else None)

    note("dashboard: bytes")
    with Terminal(population) as terminal:
        start = b"".join(terminal.until_quiet(2.0))
        # "Running for 2m" changes with the minute, in one window out of several.
        windows = [terminal.read_for(5) for _ in range(3)]
        sizes = [sum(map(len, chunks)) for chunks in windows]
        quiet = statistics.median(sizes)
        table.row("bytes in 5 s while nothing changes", f"{quiet:.0f} ({min(sizes)} .. {max(sizes)})", "", "0",
                  quiet == 0)
        for chunks in windows:
            if chunks:
                table.note(f"written while nothing changed: {readable(chunks)}")
        # Not the first, which is selected: the panel below shows it too.
        held = {name.encode() for name in population.held}
        names = [name.decode() for name in dict.fromkeys(IMAGE_NAME.findall(start)) if name in held][1:]
        rows = [population.path(name) for name in names[1:12:4]]
        if not rows:
            table.note("no held image on the first screen: the bytes of a changed row are not measured.")
            return
        for what, changes in changed_rows(terminal, rows).items():
            sizes, pieces = [sum(map(len, chunks)) for chunks in changes], statistics.median(map(len, changes))
            table.row(f"bytes for a changed row: {what}", f"{statistics.median(sizes):.0f} (most {max(sizes)}),"
                      f" in {pieces:.0f} writes", "", f"{ROW_BYTES}", max(sizes) <= ROW_BYTES)
            # One example says what it was.
            for chunks, size in [each for each in zip(changes, sizes) if each[1] > ROW_BYTES][:1]:
                table.note(f"{what}, {size} bytes in {len(chunks)} writes: {readable(chunks)}")


def is_locked(fd):
    """Asks as any stranger does; takes no lock."""
    answer = fcntl.fcntl(fd, fcntl.F_GETLK, FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 100, 105, 0))
    return FLOCK.unpack(answer)[0] != fcntl.F_UNLCK


class Lines:
    """The events of a `watch`, each with the time at which it came."""

    def __init__(self, stream):
        self.fd, self.rest = stream.fileno(), b""

    def read(self, timeout):
        if not select.select([self.fd], [], [], timeout)[0]:
            return []
        data = os.read(self.fd, 1 << 20)
        now = time.perf_counter()
        if not data:
            raise Failure("watch has ended")
        *lines, self.rest = (self.rest + data).split(b"\n")
        return [(now, line) for line in lines]


def change_seen(lines, fd, locked, kind, pid):
    """Seconds from the moment at which the lock is there (or gone) until the line about it; `None` if it is lost."""
    deadline, changed, told = time.perf_counter() + DEADLINE, None, None
    while told is None or changed is None:
        # The descriptor is an old one: to ask through it wakes nobody.
        if changed is None and is_locked(fd) == locked:
            changed = time.perf_counter()
        for at, line in lines.read(0.0002 if changed is None else 0.05):
            event = json.loads(line)
            if event["kind"] == kind and event.get("pid") == pid:
                told = told or at
        if time.perf_counter() > deadline:
            return None
    # The line may come before we have asked again.
    return max(told - changed, 0.0)


def free_raw(population):
    """Raw images that nobody holds: whatever opens them as raw may write to them."""
    return [population.path(name) for name in population.free if name.endswith(".raw")]


def delays(population, interval, runs):
    """Delays of taken and of dropped locks, and how many changes were not told."""
    paths = free_raw(population)[:20]
    note(f"delay: {runs} locks and releases, watch --interval {interval}")
    taken, dropped, lost = [], [], 0
    with contextlib.ExitStack() as stack:
        # Opened before anything is measured: an open is what watch listens to.
        images = []
        for path in paths:
            images.append((path, os.open(path, os.O_RDONLY)))
            stack.callback(os.close, images[-1][1])
        watch = stack.enter_context(started(watch_command(population, interval), stdout=subprocess.PIPE))
        lines = Lines(watch.stdout)
        while not any(b'"snapshot"' in line[:300] for _, line in lines.read(60)):
            pass
        time.sleep(SETTLE)
        for i in range(runs):
            path, fd = images[i % len(images)]
            # It holds the image until its input ends. A process each time: a new holder has to be found.
            with started(["qemu-io", "-f", "raw", path], stdin=subprocess.PIPE) as holder:
                delay = change_seen(lines, fd, True, "acquired", holder.pid)
                if delay is None and not is_locked(fd):
                    raise Failure("qemu-io takes no lock")
                taken.append(delay)
                # Long enough for the looks after an open to be over, and out of step with every timer.
                time.sleep(random.uniform(0.25, 0.35))
                holder.stdin.close()
                dropped.append(change_seen(lines, fd, False, "released", holder.pid))
                holder.wait()
            time.sleep(random.uniform(0.25, 0.35))
    lost = sum(delay is None for delay in taken + dropped)
    return [d for d in taken if d is not None], [d for d in dropped if d is not None], lost


def measure_delay(table, population, options):
    if not shutil.which("qemu-io") or not free_raw(population):
        table.note("no qemu-io, or no free raw image: delays are not measured.")
        return
    nominal = is_nominal(population.sizes)
    table.title("delay from a lock of qemu-io to the line of watch")
    fewer = max(options.delay_runs // 4, 10)
    for interval, runs in ("10s", options.delay_runs), ("1s", fewer), ("1h", fewer):
        taken, dropped, lost = delays(population, interval, runs)
        for what, found in ("taken", taken), ("dropped", dropped):
            if not found:
                continue
            p50, p99 = percentile(found, 0.5), percentile(found, 0.99)
            table.row(f"--interval {interval}: {what}, {len(found)} times",
                      f"p50 {ms(p50)}, p99 {ms(p99)}, max {ms(max(found))}", "",
                      f"p50 {DELAY_P50_MS:.0f} ms, p99 {DELAY_P99_MS:.0f} ms" if nominal else "",
                      (p50 * 1000 <= DELAY_P50_MS and p99 * 1000 <= DELAY_P99_MS) if nominal else None)
        table.row(f"--interval {interval}: lost", f"{lost} of {2 * runs}", "", "0", lost == 0)


def measure_churn(table, directory, sizes, options):
    kinds = collections.Counter()

    def count(stream):
        for line in stream:
            found = re.search(rb'"kind":"([\w-]+)"', line[:300])
            kinds[found[1].decode() if found else "?"] += 1

    samples = []
    with Population(directory, sizes, churn=options.churn) as population:
        with started(watch_command(population, "1s"), stdout=subprocess.PIPE) as watch:
            reader = threading.Thread(target=count, args=(watch.stdout,), daemon=True)
            reader.start()
            time.sleep(2 * SETTLE)
            note(f"churn: {options.churn_minutes:g} minutes")
            deadline = time.monotonic() + options.churn_minutes * 60
            used, start = cpu(watch.pid), time.monotonic()
            while time.monotonic() <= deadline:
                if watch.poll() is not None or population.process.poll() is not None:
                    raise Failure("watch or the population has ended")
                samples.append((memory(watch.pid)["RssAnon"], len(os.listdir(f"/proc/{watch.pid}/fd")),
                                len(os.listdir(f"/proc/{watch.pid}/task"))))
                time.sleep(5)
            used = (cpu(watch.pid) - used) / (time.monotonic() - start)
            end(watch, signal.SIGTERM)
            reader.join(10)

    quarter = max(len(samples) // 4, 1)
    table.title(f"churn, {options.churn} holders replaced a second for {options.churn_minutes:g} min")
    for i, (what, words, slack) in enumerate(
        [("anonymous memory", mb, 1e6), ("descriptors", "{:.0f}".format, 2), ("threads", "{:.0f}".format, 2)]
    ):
        first = statistics.median(sample[i] for sample in samples[:quarter])
        last = statistics.median(sample[i] for sample in samples[-quarter:])
        limit = first * 1.1 + slack
        table.row(f"{what}, first and last quarter", f"{words(first)}, {words(last)}", f"{last / first:.2f}x",
                  f"last <= {words(limit)}", last <= limit)
    table.row("CPU", f"{ms(used)} a second")
    words = ", ".join(f"{kind} {number}" for kind, number in kinds.most_common())
    table.note(f"churn: lines of watch by kind: {words}.")


# The machine.


def read(path, default=""):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return default


def file_system(directory):
    """The type of the file system, by the longest mount point."""
    best = ("", "?")
    for line in read("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4]
        if f"{directory}/".startswith(point.rstrip("/") + "/") and len(point) >= len(best[0]):
            best = (point, after.split()[0])
    return best[1]


def machine(directory):
    model = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.*)$", read("/proc/cpuinfo"), re.MULTILINE)
    qemu = "none"
    if shutil.which("qemu-io"):
        text = subprocess.run(["qemu-io", "--version"], capture_output=True, text=True).stdout
        qemu = (re.search(r"version (\S+)", text) or [None, "?"])[1]
    return (f"{os.cpu_count()} cores, {model[1] if model else os.uname().machine}, Linux {os.uname().release},"
            f" QEMU {qemu}, {file_system(directory)}")


def process_count():
    return sum(name.isdigit() for name in os.listdir("/proc"))


def surroundings():
    return f"{process_count()} other processes, load {read('/proc/loadavg', '?').split()[0]}"


def impossible(sizes, directory):
    """Why this machine cannot have such a population; nothing if it can."""
    processes, files = sizes.processes + process_count(), sizes.processes * sizes.descriptors
    number = lambda text, default: int(text) if text.strip().isdigit() else default
    ceilings = [
        ("kernel.pid_max", number(read("/proc/sys/kernel/pid_max"), 1 << 22), processes + 500),
        ("kernel.threads-max", number(read("/proc/sys/kernel/threads-max"), 1 << 22), processes + 500),
        ("fs.file-max", number(read("/proc/sys/fs/file-max"), 1 << 62),
         files + int((read("/proc/sys/fs/file-nr") or "0").split()[0])),
        ("open files (ulimit -n)", resource.getrlimit(resource.RLIMIT_NOFILE)[0], sizes.descriptors + 64),
        ("inodes", os.statvfs(directory).f_favail or 1 << 62, sizes.images + 100),
    ]
    if os.geteuid() != 0:
        ceilings.append(("processes (ulimit -u)", resource.getrlimit(resource.RLIMIT_NPROC)[0], processes))
    for line in read("/proc/self/cgroup").splitlines():
        group = line.rpartition(":")[2].strip("/")
        while True:
            limit = read(os.path.join("/sys/fs/cgroup", group, "pids.max"))
            ceilings.append((f"pids.max of /{group}", number(limit, 1 << 62), sizes.processes + 100))
            if not group:
                break
            group = os.path.dirname(group)
    # A member of the population takes about so much of its own, with its descriptors in the kernel.
    needed = sizes.processes * (250_000 + sizes.descriptors * 1000)
    available = re.search(r"MemAvailable:\s*(\d+) kB", read("/proc/meminfo"))
    if available:
        ceilings.append(("free memory", int(available[1]) * 1024, needed))
    # -1 is "unlimited".
    return [f"{what} is {limit}, {need} needed" for what, limit, need in ceilings if 0 <= limit < need]


# All of it.


def compare(directory, options):
    sizes, sections = options.sizes, options.sections or SECTIONS
    table = Table()
    if reasons := impossible(sizes, directory):
        raise Failure(f"this machine cannot have such a population: {'; '.join(reasons)}")
    print(f"{machine(directory)}\n{sizes.images} images, {sizes.holders} held, {sizes.processes} processes of"
          f" {sizes.descriptors} descriptors; before them {surroundings()}\n", flush=True)
    try:
        if set(sections) - {"churn"}:
            with Population(directory, sizes) as population:
                watched = None
                if {"tick", "memory"} & set(sections):
                    watched = Watched(population, "1s", options.seconds)
                measures = {
                    "list": lambda: measure_list(table, population, options),
                    "tick": lambda: measure_tick(table, population, options, watched),
                    "syscalls": lambda: measure_syscalls(table, population, options),
                    "memory": lambda: measure_memory(table, population, options, watched),
                    "screen": lambda: measure_screen(table, population, options),
                    "delay": lambda: measure_delay(table, population, options),
                }
                for name, measure in measures.items():
                    if name in sections:
                        measure()
        if "churn" in sections:
            measure_churn(table, directory, sizes, options)
    finally:
        # Also what was measured before something went wrong.
        if table.rows:
            table.print()
    return table.missed


def growth(directory, options):
    """How some figures grow, as a table for a document."""
    base = options.sizes
    grown = [base._replace(images=n) for n in options.growth_images]
    grown += [base._replace(processes=n) for n in options.growth_processes]
    grown = [sizes.with_fewer_holders() for sizes in grown]
    print(f"{machine(directory)}; {base.descriptors} descriptors a process; before them {surroundings()}\n")
    head = ["images", "held", "processes", "`list`", "tick, CPU a second", "system calls a tick", "RSS",
            "change p50", "change p99", "first screen"]
    print(f"| {' | '.join(head)} |\n|{'--:|' * len(head)}", flush=True)
    missed, notes = 0, []

    def judged(text, kept):
        nonlocal missed
        missed += kept is False
        return f"{text} (over)" if kept is False else text

    for sizes in dict.fromkeys(grown):
        what = f"{sizes.images} images and {sizes.processes} processes"
        cells = [str(sizes.images), str(sizes.holders), str(sizes.processes)]
        if reasons := impossible(sizes, directory):
            notes.append(f"{what}: not here: {'; '.join(reasons)}")
            print(f"| {' | '.join(cells + ['-'] * (len(head) - 3))} |", flush=True)
            continue
        nominal = is_nominal(sizes)
        with Population(directory, sizes) as population:
            list_once(population)
            found = [list_once(population) for _ in range(5)]
            if any(named != sizes.holders for _, _, named, _ in found):
                missed += 1
                notes.append(f"{what}: not every holder was named")
            cells.append(ms(statistics.median(wall for wall, *_ in found)))
            watched = Watched(population, "1s", options.seconds / 3)
            cells.append(judged(ms(watched.cpu), limited(watched.cpu * 1000, TICK_MS) if nominal else None))
            calls = [len(tick) for tick in traced_ticks(population, 2)[0]] if shutil.which("strace") else []
            cells.append(f"{statistics.median(calls):.0f}" if calls else "-")
            rss = watched.memory["VmRSS"]
            cells.append(judged(mb(rss), limited(rss, memory_budget(sizes.images))))
            if shutil.which("qemu-io"):
                taken, dropped, lost = delays(population, "10s", max(options.delay_runs // 5, 10))
                for share, limit in (0.5, DELAY_P50_MS), (0.99, DELAY_P99_MS):
                    value = percentile(taken + dropped, share)
                    cells.append(judged(ms(value), value * 1000 <= limit if nominal else None))
                if lost:
                    missed += 1
                    notes.append(f"{what}: {lost} changes were not told")
            else:
                cells += ["-", "-"]
            screen = statistics.median(first_screen(population)[1] for _ in range(5))
            cells.append(judged(ms(screen), limited(screen * 1000, FIRST_SCREEN_MS) if nominal else None))
        print(f"| {' | '.join(cells)} |", flush=True)
    for text in notes:
        print(f"\n{text}")
    return missed


def options():
    parser = argparse.ArgumentParser(
        prog="compare.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=" ".join(SECTIONS))
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--holders", type=int, help="images that are held; 500, or half of the images or processes")
    parser.add_argument("--processes", type=int, default=2000, help="in all, the holders among them")
    parser.add_argument("--descriptors", type=int, default=50, help="of each process")
    parser.add_argument("--growth", action="store_true", help="fewer figures, over many sizes, as a markdown table")
    parser.add_argument("--growth-images", type=numbers, default=[100, 1000, 10000], metavar="N,N..")
    parser.add_argument("--growth-processes", type=numbers, default=[200, 2000, 8000], metavar="N,N..")
    parser.add_argument("--runs", type=int, default=11, help="of list and of the first screen")
    parser.add_argument("--peer-runs", type=int, default=5, help="of each peer")
    parser.add_argument("--seconds", type=float, default=30, help="for CPU and memory; a third of it with --growth")
    parser.add_argument("--delay-runs", type=int, default=200, help="locks and releases; a fifth of it with --growth")
    parser.add_argument("--churn", type=int, default=20, help="holders replaced a second")
    parser.add_argument("--churn-minutes", type=float, default=1, help="10 for a real test")
    found = parser.parse_args()
    if unknown := set(found.sections) - set(SECTIONS):
        parser.error(f"no such section: {' '.join(sorted(unknown))}")
    found.sizes = Sizes(found.images, 500, found.processes, found.descriptors).with_fewer_holders()
    if found.holders is not None:
        found.sizes = found.sizes._replace(holders=found.holders)
    for program in QLOCK_TOP, POPULATION:
        if not os.access(program, os.X_OK):
            parser.error(f"no program {program}: build first, or set QLOCK_TOP and POPULATION")
    return found


def give_up(number, _):
    # Once: what follows is cleaning up, which nothing must hinder.
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def main():
    chosen = options()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, give_up)
    if os.geteuid() != 0:
        note("not root: what other users hold is not seen")
    try:
        where = os.environ.get("TMPDIR", "/var/tmp")
        with tempfile.TemporaryDirectory(prefix="qlock-compare-", dir=where) as directory:
            missed = (growth if chosen.growth else compare)(os.path.realpath(directory), chosen)
    except Failure as failure:
        note(str(failure))
        sys.exit(2)
    sys.exit(1 if missed else 0)


main()
