# Every target is one of dev.py: `python dev.py help`. Options: make test ARGS="-k casting"
PYTHON ?= python3
TARGETS := setup demo test proof matrix lint docs bench peer-suite compatibility package clean

.PHONY: help $(TARGETS)
help:
	@$(PYTHON) dev.py help
$(TARGETS):
	@$(PYTHON) dev.py $@ $(ARGS)
