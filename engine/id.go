package engine

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base32"
	"encoding/base64"
	"encoding/binary"
	"hash"
	"sync"

	"tercet.dev/tercet/internal/errs"
)

// Sealer turns message IDs and receipts into the opaque texts that clients hold, and back. Both carry a code
// keyed with the cluster's secret. It is safe for concurrent use.
type Sealer struct {
	id   cipher.Block
	macs sync.Pool
}

// Message IDs are five bytes of check code away from a guess, receipts sixteen.
const (
	idCheckBytes    = 5
	idBytesMax      = 3 + 10 + 5 + 1 + 10 + 5 + 1 + idCheckBytes
	idTextMax       = (idBytesMax*8 + 4) / 5
	receiptMACBytes = 16
	receiptVersion  = 1
)

// idText has no vowels that make words and no characters that a shell or a flag parser takes for its own.
var idText = base32.NewEncoding("0123456789abcdefghjkmnpqrstvwxyz").WithPadding(base32.NoPadding)

var receiptText = base64.RawURLEncoding.Strict()

// NewSealer returns the Sealer of a cluster secret.
func NewSealer(secret []byte) *Sealer {
	derive := func(purpose string) []byte {
		m := hmac.New(sha256.New, secret)
		m.Write([]byte(purpose))
		return m.Sum(nil)
	}
	block, err := aes.NewCipher(derive("tercet message id")[:16])
	if err != nil {
		panic("engine: " + err.Error()) // 16 bytes are a valid key
	}
	s := &Sealer{id: block}
	key := derive("tercet receipt")
	s.macs.New = func() any { return &mac{h: hmac.New(sha256.New, key)} }
	return s
}

type mac struct {
	h   hash.Hash
	buf []byte
	sum [sha256.Size]byte
}

// idCheck is the head of one AES block over all of the ID: a pseudo-random function of exactly 16 bytes.
func (s *Sealer) idCheck(id MessageID) [16]byte {
	var in, out [16]byte
	binary.LittleEndian.PutUint16(in[0:], id.Shard)
	binary.LittleEndian.PutUint64(in[2:], id.Index)
	binary.LittleEndian.PutUint32(in[10:], id.Pos)
	in[14] = byte(id.Kind)
	s.id.Encrypt(out[:], in[:])
	if id.Kind == KindDuplicate {
		// A second block; the kind in the first one says that there is one.
		in = [16]byte{}
		binary.LittleEndian.PutUint64(in[0:], id.OriginalIndex)
		binary.LittleEndian.PutUint32(in[8:], id.OriginalPos)
		in[12] = byte(id.OriginalKind)
		for i := range in {
			in[i] ^= out[i]
		}
		s.id.Encrypt(out[:], in[:])
	}
	return out
}

// MessageID returns the text of an ID.
func (s *Sealer) MessageID(id MessageID) string {
	var raw [idBytesMax]byte
	b := id.append(raw[:0])
	sum := s.idCheck(id)
	b = append(b, sum[:idCheckBytes]...)
	var text [idTextMax]byte
	n := idText.EncodedLen(len(b))
	idText.Encode(text[:n], b)
	return string(text[:n])
}

// ParseMessageID reads what MessageID wrote. Anything else is errs.MessageNotFound: no message was ever
// called that.
func (s *Sealer) ParseMessageID(text string) (MessageID, error) {
	var raw [idTextMax]byte
	if len(text) > idTextMax {
		return MessageID{}, errs.Of(errs.MessageNotFound)
	}
	b, err := idText.AppendDecode(raw[:0], []byte(text))
	if err != nil || len(b) <= idCheckBytes {
		return MessageID{}, errs.Of(errs.MessageNotFound)
	}
	r := reader{b: b[:len(b)-idCheckBytes]}
	id := r.messageID()
	sum := s.idCheck(id)
	same := subtle.ConstantTimeCompare(sum[:idCheckBytes], b[len(b)-idCheckBytes:]) == 1
	if !r.done() || !same || s.MessageID(id) != text {
		return MessageID{}, errs.Of(errs.MessageNotFound)
	}
	return id, nil
}

// Receipt returns the text of a receipt.
func (s *Sealer) Receipt(rc Receipt) string {
	m := s.macs.Get().(*mac)
	m.buf = append(m.buf[:0], receiptVersion)
	m.buf = rc.append(m.buf)
	m.h.Reset()
	m.h.Write(m.buf)
	m.buf = append(m.buf, m.h.Sum(m.sum[:0])[:receiptMACBytes]...)
	var text [128]byte
	out := string(receiptText.AppendEncode(text[:0], m.buf))
	s.macs.Put(m)
	return out
}

// receiptTextMax bounds a receipt's text: version, five numbers, code.
const receiptTextMax = (1 + 3 + 4*10 + receiptMACBytes + 2) / 3 * 4

// ParseReceipt reads what Receipt wrote; anything else is errs.InvalidReceipt. Where the text differs from a
// valid one does not show in the time it takes.
func (s *Sealer) ParseReceipt(text string) (Receipt, error) {
	if len(text) > receiptTextMax {
		return Receipt{}, errs.Of(errs.InvalidReceipt)
	}
	m := s.macs.Get().(*mac)
	defer s.macs.Put(m)
	var err error
	m.buf, err = receiptText.AppendDecode(m.buf[:0], []byte(text))
	// The decoder passes over line breaks; a receipt has one text only.
	if err != nil || len(m.buf) <= receiptMACBytes || receiptText.EncodedLen(len(m.buf)) != len(text) {
		return Receipt{}, errs.Of(errs.InvalidReceipt)
	}
	body, code := m.buf[:len(m.buf)-receiptMACBytes], m.buf[len(m.buf)-receiptMACBytes:]
	m.h.Reset()
	m.h.Write(body)
	if !hmac.Equal(m.h.Sum(m.sum[:0])[:receiptMACBytes], code) {
		return Receipt{}, errs.Of(errs.InvalidReceipt)
	}
	r := reader{b: body}
	if r.u8() != receiptVersion {
		return Receipt{}, errs.Of(errs.InvalidReceipt)
	}
	rc := r.receipt()
	if !r.done() {
		return Receipt{}, errs.Of(errs.InvalidReceipt)
	}
	return rc, nil
}
