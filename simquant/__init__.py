"""Everything around quant_utils.py. A file imports only what stands below it; tests/test_house.py has the order."""
