"""The demo's program: imports like an application, answers, then reads the image it runs in.

Arguments: the number of batches. For each line on standard input it reads one batch of files and prints
the digest of each.
"""
import importlib
import sys

MODULES = """
abc argparse array ast asyncio base64 bisect calendar cmath cmd code codecs collections colorsys
concurrent.futures configparser contextlib contextvars copy csv ctypes dataclasses datetime decimal difflib
dis email.message email.mime.multipart enum fileinput filecmp fnmatch fractions ftplib functools getopt
getpass gettext glob graphlib gzip hashlib heapq hmac html html.parser http.client http.cookies http.server
imaplib importlib.metadata inspect io ipaddress itertools json keyword linecache locale logging
logging.config logging.handlers lzma mailbox mimetypes mmap multiprocessing netrc numbers opcode operator
optparse os pathlib pdb pickle pickletools pkgutil platform plistlib poplib pprint profile queue quopri
random re reprlib sched secrets selectors shelve shlex shutil signal smtplib socket socketserver sqlite3 ssl
statistics string struct subprocess symtable tarfile tempfile textwrap threading timeit token tokenize trace
traceback tracemalloc types typing unittest unittest.mock urllib.parse urllib.request uuid warnings wave
weakref webbrowser wsgiref.simple_server xml.dom.minidom xml.etree.ElementTree xml.sax xmlrpc.client
xmlrpc.server zipapp zipfile zipimport zlib
""".split()

imported = 0
for name in MODULES:
    try:
        importlib.import_module(name)
        imported += 1
    except ImportError:
        pass  # A small installation has not all of the library.

import hashlib
import json
import os


def files_touched():
    """Files that are certainly open or were read: this one, what modules were loaded from (the compiled
    file where there is one), and what is mapped into memory."""
    touched = {os.path.realpath(__file__)}
    for module in list(sys.modules.values()):
        cached = getattr(module, "__cached__", None)
        source = getattr(module, "__file__", None)
        for path in (cached, source):
            if isinstance(path, str) and os.path.exists(path):
                touched.add(os.path.realpath(path))
                break
    with open("/proc/self/maps") as maps:
        for line in maps:
            path = line.rstrip("\n").split(maxsplit=5)[5:]
            if path and path[0].startswith("/"):
                touched.add(path[0])
    return len(touched)


print(json.dumps({"modules": imported, "files_touched": files_touched()}), flush=True)


def files_to_read(most=96 << 20):
    """The library, then the largest files, in an order that every run finds again."""
    library, others = [], []
    for folder, folders, names in os.walk("/usr"):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.islink(path) or not os.path.isfile(path):
                continue
            size = os.path.getsize(path)
            of_library = path.startswith("/usr/lib/python3")
            (library if of_library else others).append((-size, path))
    left, chosen = most, []
    for size, path in sorted(library) + sorted(others):
        if -size <= left:
            left += size
            chosen.append(path)
    return chosen


batches = int(sys.argv[1])
files = files_to_read()
for batch in range(batches):
    if not sys.stdin.readline():
        break
    for path in files[batch::batches]:
        try:
            with open(path, "rb") as file:
                digest = hashlib.sha256(file.read()).hexdigest()
        except OSError as error:
            digest = f"failed:{error.errno}"
        print(f"{digest}  {path}", flush=True)
