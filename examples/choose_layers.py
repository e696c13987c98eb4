"""Which layer gets which format: the defaults, rules, and a rule that does nothing."""

from models import mixture_of_experts

from lightning_fp import LinearFormat, convert


def main() -> None:
    model, example_input = mixture_of_experts()

    print("Defaults: all linear layers but the output head and the routers.")
    print(convert(model, example_input=example_input), end="\n\n")

    print("Rules: the first match wins. A glob covers the whole name, 're:' a regular expression.")
    rules = {
        "re:blocks[.](0|3)[.].*": "bf16",  # the first and the last block
        "*.attention.*": "fp8-rowwise",
        "*.down_proj": LinearFormat("dynamic", "tensor", grad_output="e4m3"),
        "lm_head": "fp8-rowwise-gw-hp",  # the head after all: rules overrule the defaults
    }
    print(convert(model, "fp8-dynamic", rules, example_input=example_input), end="\n\n")

    print("A rule without effect is an error:")
    try:
        convert(model, layers={"block.*": "bf16"})
    except ValueError as error:
        print(f"  {error}")


if __name__ == "__main__":
    main()
