package push

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"strconv"
	"strings"
)

// A secret's text is this prefix and base64 of 24 to 64 random bytes.
const (
	secretPrefix   = "whsec_"
	secretBytesMin = 24
	secretBytesMax = 64
	secretBytes    = 32
)

// newSecret draws a signing secret.
func newSecret() string {
	var b [secretBytes]byte
	_, _ = rand.Read(b[:]) // never fails, by its contract
	return secretPrefix + base64.StdEncoding.EncodeToString(b[:])
}

// secretKey returns the key that a secret's text stands for.
func secretKey(text string) ([]byte, error) {
	encoded, ok := strings.CutPrefix(text, secretPrefix)
	if !ok {
		return nil, fmt.Errorf("a secret begins with %s", secretPrefix)
	}
	key, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("behind %s a secret is base64", secretPrefix)
	}
	if len(key) < secretBytesMin || len(key) > secretBytesMax {
		return nil, fmt.Errorf("a secret holds %d to %d bytes, not %d", secretBytesMin, secretBytesMax, len(key))
	}
	return key, nil
}

// sign returns the value of webhook-signature: one signature for each key, the newest key's first, so that a
// receiver that knows any of them accepts the request.
func sign(keys [][]byte, id string, unixSeconds int64, body []byte) string {
	var b strings.Builder
	for i, key := range keys {
		if i > 0 {
			b.WriteByte(' ')
		}
		m := hmac.New(sha256.New, key)
		m.Write([]byte(id))
		m.Write([]byte{'.'})
		m.Write(strconv.AppendInt(nil, unixSeconds, 10))
		m.Write([]byte{'.'})
		m.Write(body)
		b.WriteString("v1,")
		b.WriteString(base64.StdEncoding.EncodeToString(m.Sum(nil)))
	}
	return b.String()
}
