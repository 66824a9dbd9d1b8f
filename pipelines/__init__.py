"""Drop-in pipelines: loading and pruning of whole diffusers pipelines. Imported as `genprune.pipelines`."""

from genprune.pipelines.loading import load_pipeline, pipeline_folder

__all__ = ["load_pipeline", "pipeline_folder"]
