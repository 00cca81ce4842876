"""Attacks from inside a VM, as the user: each is a program that prints what it got hold of, and nothing when it failed.

`{gateway}`, `{other_vm}`, `{host}`, `{host_port}`, `{marker}`, `{node}` and `{domain}` are filled in by the tests: a VM
next door, an address and a listener of the host, a host process's argument, the server's directory, a foreign domain.
"""

from __future__ import annotations

_TRY = """
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
def got(what):
    print(what, flush=True)
def attempt(what, f, *a):
    try: f(*a)
    except (OSError, ValueError): return
    got(what)
def connects(address, port, family=socket.AF_INET):
    with socket.socket(family, socket.SOCK_STREAM) as s:
        s.settimeout(20)
        s.connect((address, port))
"""


def _python(code: str) -> str:
    return f"python3 - <<'END'\n{_TRY}\n{code}\nEND"


def _writes(*paths: str) -> str:
    return "; ".join(f"(echo 1 > {path}) 2>/dev/null && echo wrote {path}" for path in paths) + "; true"


def _reads(*paths: str) -> str:
    return "; ".join(f"head -c 1 {path} 2>/dev/null | grep -q . && echo read {path}" for path in paths) + "; true"


# What the user may not have.
ESCAPES: dict[str, str] = {
    "the host's files": "find / -path /proc -prune -o -path '*{node}*' -print 2>/dev/null; cat "
    "{node}/node.json 2>/dev/null; true",
    "the host's processes": "grep -sl {marker} /proc/[0-9]*/cmdline | grep -v -e /$$/ -e /self/ | while read f; do "
    "tr '\\0' ' ' < $f | grep -v grep; done | grep -v bash; true",
    "init's memory, files and environment": _reads("/proc/1/mem", "/proc/1/root/etc/shadow", "/proc/1/cwd/etc/passwd"),
    "init's output": _writes("/proc/1/fd/1", "/proc/1/fd/2", "/dev/console", "/dev/kmsg"),
    "the agent's code": _reads("/opt/rds/agent/__main__.py") + "; ls -A /opt/rds /run/agent 2>/dev/null; true",
    "the agent's socket": _python(
        "for path in ('/run/agent/agent.sock', '/run/agent'):\n"
        "    attempt('socket', lambda: socket.socket(socket.AF_UNIX).connect(path))\n"
    ),
    "the agent's port": _python(
        "for path in ('/dev/vport0p1', '/dev/hvc0', '/dev/virtio-ports/agent'): attempt(path, os.open, path, os.O_RDWR)"
    ),
    "signals to init": "for s in KILL STOP TERM SEGV; do kill -$s 1 2>/dev/null && echo $s; done; true",
    "tracing init": _python(
        "for request in (16, 0x4206):\n    if libc.ptrace(request, 1, None, None) == 0: got('ptrace')\n"
        "if libc.process_vm_readv(1, None, 0, None, 0, 0) > 0: got('process_vm_readv')"
    ),
    "another identity": _python(
        "attempt('setuid', os.setuid, 0); attempt('setgid', os.setgid, 0); attempt('groups', os.setgroups, [0])\n"
        "attempt('setresuid', os.setresuid, 0, 0, 0)"
    ),
    "setuid programs": "cp /bin/id s; chmod 6755 s; ./s | grep -oE 'e[ug]id=0'; for p in $(find / -xdev -perm "
    "/6000 -type f "
    "2>/dev/null | grep -v ^/workspace/); do echo $p; done; rm -f s; su -c id </dev/null 2>/dev/null; sudo -n "
    "id 2>/dev/null; true",
    "capabilities by a namespace": "for kind in U UC Un Um Ui Uu Up m n; do "
    "unshare -r$kind grep CapEff /proc/self/status 2>/dev/null; done; "
    "unshare -Urm sh -c 'mount -t tmpfs none /tmp && echo mounted' 2>/dev/null; "
    "unshare -Ur ip addr add 172.16.99.99/32 dev eth0 2>/dev/null && echo address; "
    "unshare -Urn sh -c 'ip link add d type dummy && echo linked' 2>/dev/null; true",
    "a namespace by its system calls": _python(
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "for flag in (0x10000000, 0x20000, 0x40000000, 0x10020000):\n"
        "    if libc.unshare(flag) == 0: got('unshare')\n"
        "    pid = libc.syscall({{'x86_64': 56, 'aarch64': 220}}[os.uname().machine], flag | 17, 0, 0, 0, 0)\n"
        "    if pid == 0: os._exit(0)\n"
        "    if pid > 0: got('clone')\n"
        "    arguments = (ctypes.c_uint64 * 11)(flag, 0, 0, 0, 17)\n"
        "    pid = libc.syscall(435, arguments, 88)\n"
        "    if pid == 0: os._exit(0)\n"
        "    if pid > 0: got('clone3')\n"
        "for name in os.listdir('/proc/self/ns') if os.path.exists('/proc/self/ns') else ():\n"
        "    fd = os.open('/proc/self/ns/' + name, os.O_RDONLY)\n"
        "    if libc.setns(fd, 0) == 0: got('setns')\n"
    ),
    "mounting": "for t in tmpfs proc sysfs devtmpfs; do mount -t $t none /tmp 2>/dev/null && echo $t; done; "
    "mount -o remount,rw / 2>/dev/null && echo remounted; true",
    "another root": "chroot / true 2>/dev/null && echo chroot; pivot_root / /tmp 2>/dev/null && echo pivot; true",
    "device nodes": "for d in /workspace /tmp /var/tmp /dev/shm; do for n in 'b 8 0' 'b 7 0' 'c 1 1' 'c 1 3'; do "
    "mknod $d/node $n 2>/dev/null && echo $d $n; rm -f $d/node; done; done; true",
    "raw disks and memory": _python(
        "for name in os.listdir('/dev'):\n"
        "    if name.startswith(('sd', 'vd', 'loop', 'nvme', 'mem', 'kmem', 'port', 'kvm')):\n"
        "        attempt(name, os.open, '/dev/' + name, os.O_RDONLY)\n"
        "attempt('kcore', lambda: open('/proc/kcore', 'rb').read(1) or os.open('/nothing', 0))"
    ),
    "the kernel's switches": _writes(
        "/proc/sys/kernel/core_pattern",
        "/proc/sys/kernel/modprobe",
        "/proc/sys/kernel/hostname",
        "/proc/sys/net/ipv4/ip_forward",
        "/proc/sys/vm/drop_caches",
        "/proc/sysrq-trigger",
        "/sys/power/state",
        "/sys/kernel/uevent_helper",
        "/sys/fs/cgroup/cgroup.procs",
    ),
    "system calls for administrators": _python(
        "calls = {{'init_module': 175, 'kexec_load': 246, 'bpf': 321, 'perf_event_open': 298, 'reboot': 169, "
        "'swapon': 167,\n"
        "    'settimeofday': 164, 'sethostname': 170, 'acct': 163, 'iopl': 172, 'quotactl': 179, "
        "'open_by_handle_at': 304}}\n"
        "for name, number in calls.items():\n"
        "    if libc.syscall(number, 3, 0, 0, 0, 0) >= 0: got(name)"
    ),
    "the root file system": _writes("/x", "/etc/passwd", "/etc/profile", "/usr/bin/x", "/opt/x", "/run/x", "/root/x"),
    "hard links to others' files": "for f in /etc/shadow /etc/passwd /opt/rds/agent/__main__.py; do "
    "ln $f /workspace/h 2>/dev/null && echo linked $f && rm -f /workspace/h; done; true",
    "higher limits": "ulimit -Hu 99999 2>/dev/null && echo processes; ulimit -Hn 999999 2>/dev/null && echo "
    "files; true",
    "raw sockets": _python(
        "for kind in (1, 6, 17, 255): attempt('raw', socket.socket, socket.AF_INET, socket.SOCK_RAW, kind)\n"
        "attempt('raw IPv6', socket.socket, socket.AF_INET6, socket.SOCK_RAW, 58)"
    ),
    "packets by hand (ARP spoofing)": _python("attempt('packet', socket.socket, 17, socket.SOCK_RAW, socket.htons(3))"),
    "another source address": _python(
        "for option in (None, 15, 19):\n"  # IP_FREEBIND, IP_TRANSPARENT
        "    def spoof():\n"
        "        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
        "        if option: s.setsockopt(socket.SOL_IP, option, 1)\n"
        "        s.bind(('{other_vm}', 0)); s.sendto(b'x', ('203.0.113.1', 9))\n"
        "    attempt('source', spoof)"
    ),
    "the network's set-up": "ip link set eth0 down 2>/dev/null && echo link; ip addr add 10.9.9.9/32 dev eth0 "
    "2>/dev/null "
    "&& echo address; ip route add 10.9.9.0/24 dev eth0 2>/dev/null && echo route; "
    "ip neigh add 172.16.0.1 lladdr 02:00:00:00:00:01 dev eth0 2>/dev/null && echo neighbour; true",
    "metadata services": _python(
        "for a in ('169.254.169.254', '169.254.170.2', '100.100.100.200', '192.0.0.192'): attempt(a, connects, a, 80)"
    ),
    "the gateway's ports": _python(
        "for port in (22, 53, 80, 3000, {host_port}): attempt(port, connects, '{gateway}', port)\n"
    ).replace("53, ", ""),
    "the host's own addresses": _python("attempt('{host}', connects, '{host}', {host_port})"),
    "another VM": _python(
        "for port in (22, 80, 7777): attempt(port, connects, '{other_vm}', port)\n"
        "s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.5)\n"
        "def ask(): s.sendto(b'x', ('{other_vm}', 7777)); s.recv(1)\n"
        "attempt('udp', ask)"
    ),
    "ICMP": "ping -c 1 -W 1 {gateway} >/dev/null 2>&1 && echo gateway; ping -c 1 -W 1 {other_vm} >/dev/null "
    "2>&1 && echo vm; true",
    "IPv6": _python(
        "for a in ('2001:db8::1', 'fe80::1%eth0', 'ff02::1%eth0', '::ffff:192.0.2.1'):\n"
        "    attempt(a, connects, a, 80, socket.AF_INET6)"
    ),
    "other name servers": _python(
        "query = bytes.fromhex('000101000001000000000000') + b'\\x01a\\x07example\\x03org\\x00\\x00\\x01\\x00\\x01'\n"
        "def ask(a):\n"
        "    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(0.5); s.connect((a, 53)); "
        "s.send(query)\n"
        "    if s.recv(512)[3] & 15 != 5: got(a)\n"
        "for a in ('192.0.2.53', '{host}'):\n"
        "    try: ask(a)\n"
        "    except OSError: pass\n"
        "attempt('tcp', connects, '192.0.2.53', 53)"
    ),
    "a tunnel of names": _python(
        "import base64\n"
        "for n in range(8):\n"
        "    label = base64.b32encode(os.urandom(30)).decode().strip('=').lower()\n"
        "    attempt(label, socket.getaddrinfo, label + '.{domain}', 80)"
    ),
    "others of the host's sockets": _python(
        "for path in ('/run/docker.sock', '/var/run/dbus/system_bus_socket', '/run/systemd/private', '\\0x'):\n"
        "    attempt(path, lambda: socket.socket(socket.AF_UNIX).connect(path))\n"
        "for port in (2, 3): attempt('vsock', lambda: socket.socket(40, 1).connect((2, port)))"
    ),
}

# Those that meet a kernel of another kind in each engine.
OF_THE_ENGINE = (
    "the host's files",
    "init's memory, files and environment",
    "init's output",
    "the agent's code",
    "the agent's port",
    "signals to init",
    "another identity",
    "capabilities by a namespace",
    "mounting",
    "raw disks and memory",
    "the kernel's switches",
    "system calls for administrators",
    "the root file system",
    "raw sockets",
    "another source address",
    "metadata services",
    "another VM",
    "IPv6",
    "a tunnel of names",
)

# What the user may do to the own VM, as hard as it goes; nobody else may notice.
FLOODS: dict[str, str] = {
    "processes": "b() {{ b | b & }}; b; sleep 60",
    "memory": "for i in 1 2 3; do tail /dev/zero & done; wait",
    "disk": "cat /dev/zero > big; rm -f big",
    "inodes": "mkdir -p many && cd many && python3 -c 'for n in range(10**6): open(str(n), \"w\").close()'; "
    "rm -rf /workspace/many",
    "output": "yes 'a line of output' | head -c 10G",
    "output on both streams": "yes out | head -c 5G & yes err | head -c 5G >&2; wait",
    "CPU": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
    "packets": "python3 -c 'import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nwhile True:\n"
    '    try: s.sendto(bytes(1000), ("{gateway}", 9))\n    except OSError: pass\'',
    "names": "while :; do getent hosts $RANDOM.{domain}; done",
    "connections": "while :; do (exec 3<>/dev/tcp/{gateway}/9) 2>/dev/null; done",
    "temporary files": "cat /dev/zero > /tmp/x; cat /dev/zero > /dev/shm/x; rm -f /tmp/x /dev/shm/x",
}
