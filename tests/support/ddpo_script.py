"""A script as people wrote it for TRL 0.23; tests run it with the first import changed."""

import numpy as np
from transformers import HfArgumentParser
from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # pyright: ignore[reportMissingImports]

animals = ["cat", "dog", "horse", "monkey"]
logged = []


def prompt_fn():
    return np.random.choice(animals), {"legs": 4}


def brightness(images, prompts, metadata):
    assert len(images) == len(prompts) and all(item == {"legs": 4} for item in metadata)
    return images.mean(dim=(1, 2, 3)), {"scorer": "brightness"}


def log_images(image_data, global_step, tracker):
    images, prompts, _, rewards, info = image_data[-1]
    assert info == {"scorer": "brightness"}
    logged.append((global_step, [prompt for batch in image_data for prompt in batch[1]]))
    pictures = {f"{prompt} {i} | {rewards[i].item():.2f}": images[i].unsqueeze(0) for i, prompt in enumerate(prompts)}
    tracker.log_images(pictures, step=global_step)


(config,) = HfArgumentParser((DDPOConfig,)).parse_args_into_dataclasses()  # pyright: ignore[reportArgumentType]
config.project_kwargs = {
    "logging_dir": "./logs",
    "automatic_checkpoint_naming": True,
    "total_limit": 5,
    "project_dir": "./save",
}
pipeline = DefaultDDPOStableDiffusionPipeline("model", pretrained_model_revision="main", use_lora=USE_LORA)  # noqa: F821 # pyright: ignore[reportUndefinedVariable]
trainer = DDPOTrainer(config, brightness, prompt_fn, pipeline, image_samples_hook=log_images)
trainer.train()
trainer.save_pretrained("tuned")
