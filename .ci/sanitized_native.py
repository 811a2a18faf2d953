"""pytest plugin: dar_kernels._native is the build in $DAR_SANITIZED, whatever is installed."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

(path,) = Path(os.environ["DAR_SANITIZED"]).glob("_native.*.so")
spec = spec_from_file_location("dar_kernels._native", path)
if spec is None or spec.loader is None:
    raise ImportError(f"{path}: no extension module")
module = module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
