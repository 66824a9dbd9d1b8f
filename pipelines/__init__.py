"""Drop-in pipelines: loading and pruning of whole diffusers pipelines. Imported as `genprune.pipelines`."""
