"""placeholder"""


class WeightMethod: ...
