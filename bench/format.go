package bench

import (
	"fmt"
	"time"
)

// FormatBytes writes a size with a binary unit: 4 KiB, 1.5 MiB.
func FormatBytes(n int64) string {
	v, units := float64(n), []string{"B", "KiB", "MiB", "GiB", "TiB"}
	for v >= 1024 && len(units) > 1 {
		v, units = v/1024, units[1:]
	}
	if v == float64(int64(v)) {
		return fmt.Sprintf("%d %s", int64(v), units[0])
	}
	return fmt.Sprintf("%.1f %s", v, units[0])
}

// FormatCount writes a number with thin groups of three digits: 151 700.
func FormatCount(n float64) string {
	s := fmt.Sprintf("%.0f", n)
	sign := ""
	if s[0] == '-' {
		sign, s = "-", s[1:]
	}
	for at := len(s) - 3; at > 0; at -= 3 {
		s = s[:at] + " " + s[at:]
	}
	return sign + s
}

// formatMillis writes a duration in milliseconds with as many digits as it has.
func formatMillis(us int64) string {
	switch ms := float64(us) / 1000; {
	case ms < 10:
		return fmt.Sprintf("%.2f", ms)
	case ms < 100:
		return fmt.Sprintf("%.1f", ms)
	default:
		return fmt.Sprintf("%.0f", ms)
	}
}

func micros(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
