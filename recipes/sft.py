"""Supervised fine-tuning with concepts in the loss, or with an intervention.

    accelerate launch --config_file recipes/accelerate_configs/cpu.yaml recipes/sft.py \\
        --config recipes/learn_without_a_concept/sft/config_ablation.yaml

Columns of the data: `messages`, `text`, or `prompt` and `completion`. Everything but the `interp:` section is TRL's
own; unknown keys are refused.
"""

from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config

from interp_rlhf import InterpSFTTrainer
from interp_rlhf.recipe import InterpArguments, datasets_of, model_of, resume_of

ARGUMENTS = (ScriptArguments, SFTConfig, ModelConfig, InterpArguments)


def main() -> None:
    parser = TrlParser(ARGUMENTS, description=__doc__)
    script, args, model, ours = parser.parse_args_and_config()
    trainer = InterpSFTTrainer(
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
