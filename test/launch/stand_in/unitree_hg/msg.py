"""Types that carry serialized messages; see the package."""

from std_msgs.msg import UInt8MultiArray

HandCmd = HandState = LowCmd = LowState = UInt8MultiArray
