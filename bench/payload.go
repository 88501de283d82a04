package bench

import (
	"math/rand/v2"
)

// poolBytes bounds the memory of a pool of prepared requests. It is large beside the window of the store's block
// compression, so that no two equal bodies meet there.
const poolBytes = 8 << 20

// poolSize is how many different requests of this size are prepared.
func poolSize(bytes int) int { return max(8, min(8192, poolBytes/max(1, bytes))) }

// bodies makes incompressible message bodies; equal seeds give equal bodies.
type bodies struct{ r *rand.ChaCha8 }

func newBodies(seed uint64) *bodies {
	var key [32]byte
	for i := range 8 {
		key[i] = byte(seed >> (8 * i))
	}
	return &bodies{r: rand.NewChaCha8(key)}
}

func (b *bodies) next(size int) []byte {
	body := make([]byte, size)
	_, _ = b.r.Read(body) // never fails
	return body
}
