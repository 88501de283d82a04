package nodecert

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"strings"
	"time"
)

// The texts of the two kinds of token:
//
//	tercet-found-B   B = secret (32) created, Unix seconds (8) check (4)
//	tercet-join-B    B = id (8) secret (32) SHA-256 of the authority's certificate (32) check (4)
//
// B is base64 for URLs without padding, numbers are little-endian, and check is the begin of the SHA-256 of what is before
// it: a token that was cut or mistyped is not taken for one that was revoked.
const (
	foundPrefix = "tercet-found-"
	joinPrefix  = "tercet-join-"
	checkBytes  = 4
)

// founding is what the first nodes of a cluster share: whoever has it can make the cluster's authority.
type founding struct {
	secret  [32]byte
	created time.Time
}

// joining lets one node into a cluster, once.
type joining struct {
	id          [8]byte
	secret      [32]byte
	fingerprint [32]byte
}

// NewFounding makes the token that the founding nodes of one cluster are started with.
func NewFounding(now time.Time) string {
	var secret [32]byte
	_, _ = rand.Read(secret[:])
	return founding{secret, now}.text()
}

func (f founding) text() string {
	b := append([]byte(nil), f.secret[:]...)
	return wrap(foundPrefix, binary.LittleEndian.AppendUint64(b, uint64(f.created.Unix()))) //nolint:gosec // after 1970
}

func (j joining) text() string {
	return wrap(joinPrefix, bytes.Join([][]byte{j.id[:], j.secret[:], j.fingerprint[:]}, nil))
}

func (j joining) key() string { return hex.EncodeToString(j.id[:]) }

func wrap(prefix string, b []byte) string {
	check := sha256.Sum256(append([]byte(prefix), b...))
	return prefix + base64.RawURLEncoding.EncodeToString(append(b, check[:checkBytes]...))
}

func unwrap(prefix, text string, size int) ([]byte, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(strings.TrimPrefix(text, prefix))
	if err != nil || len(b) != size+checkBytes {
		return nil, errors.New("the token is damaged: it has been cut or mistyped")
	}
	check := sha256.Sum256(append([]byte(prefix), b[:size]...))
	if !bytes.Equal(check[:checkBytes], b[size:]) {
		return nil, errors.New("the token is damaged: it has been cut or mistyped")
	}
	return b[:size], nil
}

// parseToken reads a token of either kind; the other one is nil.
func parseToken(text string) (*founding, *joining, error) {
	switch {
	case strings.HasPrefix(text, foundPrefix):
		b, err := unwrap(foundPrefix, text, 40)
		if err != nil {
			return nil, nil, err
		}
		f := &founding{secret: [32]byte(b), created: time.Unix(int64(binary.LittleEndian.Uint64(b[32:])), 0).UTC()} //nolint:gosec // checked below
		if y := f.created.Year(); y < 2000 || y > 9000 {
			return nil, nil, errors.New("the token was made in an impossible year")
		}
		return f, nil, nil
	case strings.HasPrefix(text, joinPrefix):
		b, err := unwrap(joinPrefix, text, 72)
		if err != nil {
			return nil, nil, err
		}
		return nil, &joining{id: [8]byte(b), secret: [32]byte(b[8:]), fingerprint: [32]byte(b[40:])}, nil
	}
	return nil, nil, errors.New("want a token of `tercet cluster token create`")
}

// CheckToken reports whether text can be a token.
func CheckToken(text string) error {
	_, _, err := parseToken(text)
	return err
}
