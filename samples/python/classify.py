"""Print the most probable classes of an image:  python classify.py BUNDLE cat.jpg"""

import sys

from evm_deploy import EvmError, load

try:
    with load(sys.argv[1]) as model:
        for prediction in model.predict(sys.argv[2:3])[0]:
            print(f"{prediction.score:.3f}  {prediction.label}")
except EvmError as error:
    sys.exit(f"error: {error}")
