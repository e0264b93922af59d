"""Direct preference optimization with concepts in the loss.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/dpo.py \\
        --config recipes/keep_a_concept/dpo/config_anchor.yaml

Columns of the data: `prompt`, `chosen`, `rejected`. Everything but the `interp:` section is TRL's own; unknown keys are refused.
"""

from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from interp_rlhf import InterpDPOTrainer
from interp_rlhf.recipe import InterpArguments, datasets_of, model_of, resume_of

ARGUMENTS = (ScriptArguments, DPOConfig, ModelConfig, InterpArguments)


def main() -> None:
    parser = TrlParser(ARGUMENTS, description=__doc__)
    script, args, model, ours = parser.parse_args_and_config()
    trainer = InterpDPOTrainer(
        model=model_of(model, args),
        args=args,
        peft_config=get_peft_config(model),
        **datasets_of(script),
        **ours.attach_keywords(),
    )
    trainer.train(resume_from_checkpoint=resume_of(args))
    trainer.save_model(args.output_dir)


if __name__ == "__main__":
    main()
