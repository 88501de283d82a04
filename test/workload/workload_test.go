package workload

import "testing"

func TestBody(t *testing.T) {
	for _, size := range []int{0, 5, 6, 7, 100, 30 << 10} {
		b := Body("k-1-2", size)
		if key, intact := KeyOf(b); key != "k-1-2" || !intact {
			t.Errorf("size %d: key %q, intact %v", size, key, intact)
		}
		if size < 100 {
			continue
		}
		if len(b) != size {
			t.Errorf("%d bytes, want %d", len(b), size)
		}
		for _, i := range []int{1, 8, size - 1} {
			spoiled := append([]byte(nil), b...)
			spoiled[i] ^= 1
			if _, intact := KeyOf(spoiled); intact {
				t.Errorf("a flipped bit in byte %d of %d is not noticed", i, size)
			}
		}
	}
}
