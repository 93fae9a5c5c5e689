"""Types that carry serialized messages; see the package."""

from std_msgs.msg import UInt8MultiArray

HandCmd = LowCmd = LowState = UInt8MultiArray
