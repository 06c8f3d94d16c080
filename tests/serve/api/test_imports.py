"""The HTTP process holds no model, and does not pay for what holds one."""

from __future__ import annotations

import subprocess
import sys


def test_the_application_imports_neither_torch_nor_ray() -> None:
    code = "import sys, rayft.serve.assemble; print({'torch', 'transformers', 'peft', 'ray'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
