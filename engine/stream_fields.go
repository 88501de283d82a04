package engine

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"strconv"
	"unicode/utf8"

	"tercet.dev/tercet/internal/errs"
)

// The names under which a message of the queue protocol shows its parts to Valkey clients; its headers follow under
// their own names.
const (
	fieldBody        = "body"
	fieldContentType = "content-type"
	fieldBodyBytes   = "body-bytes" // of a large message, whose body is empty here
)

// Content types under which fields show over HTTP.
const (
	fieldsContentType = "application/json"
	pairsContentType  = "application/vnd.tercet.fields+json"
)

// fields is a record as Valkey clients see it: names and values in turn. They point into the record.
func (rec *record) fields() [][]byte {
	if rec.flags&recordFields != 0 {
		return decodeFields(rec.body)
	}
	out := make([][]byte, 0, 4+2*rec.headers)
	body := rec.body
	if rec.flags&recordLarge != 0 {
		// Its parts are not put together for a read of many entries: the size says that there is more.
		l, _ := parseLarge(rec.body)
		out = append(out, []byte(fieldBodyBytes), strconv.AppendUint(nil, uint64(l.Bytes), 10))
		body = nil
	}
	out = append(out, []byte(fieldBody), body, []byte(fieldContentType), rec.contentType)
	in := reader{b: rec.headerBytes}
	for range rec.headers {
		out = append(out, in.bytes(), in.bytes())
	}
	return out
}

// fieldsBody is how fields show over HTTP: as a JSON object if every name is there once and all of it is UTF-8, else
// as an array of pairs, each a name and a value in base64.
func fieldsBody(fields [][]byte) (contentType string, body []byte) {
	seen := make(map[string]bool, len(fields)/2)
	plain := true
	for i, f := range fields {
		if !utf8.Valid(f) || i%2 == 0 && seen[string(f)] {
			plain = false
			break
		}
		if i%2 == 0 {
			seen[string(f)] = true
		}
	}
	var b bytes.Buffer
	if !plain {
		b.WriteByte('[')
		for i := 0; i+1 < len(fields); i += 2 {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(`["` + base64.StdEncoding.EncodeToString(fields[i]) + `","` + base64.StdEncoding.EncodeToString(fields[i+1]) + `"]`)
		}
		b.WriteByte(']')
		return pairsContentType, b.Bytes()
	}
	text := func(s []byte) {
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		_ = enc.Encode(string(s)) // of a string into memory
		b.Truncate(b.Len() - 1)   // the line end
	}
	b.WriteByte('{')
	for i := 0; i+1 < len(fields); i += 2 {
		if i > 0 {
			b.WriteByte(',')
		}
		text(fields[i])
		b.WriteByte(':')
		text(fields[i+1])
	}
	b.WriteByte('}')
	return fieldsContentType, b.Bytes()
}

// cloneFields copies fields out of a buffer that will be used again.
func cloneFields(fields [][]byte) [][]byte {
	n := 0
	for _, f := range fields {
		n += len(f)
	}
	buf := make([]byte, 0, n)
	for i, f := range fields {
		at := len(buf)
		buf = append(buf, f...)
		fields[i] = buf[at:len(buf):len(buf)]
	}
	return fields
}

// loadEntries fills the fields of entries, with dbMu held. What was removed meanwhile is marked Deleted.
func (e *Engine) loadEntries(list []*StreamEntry) error {
	ds, todo := entryDeliveries(list)
	if len(ds) == 0 {
		return nil
	}
	err := e.loadAll(ds)
	return loadedEntries(ds, todo, err)
}

// loadEntriesLocked is loadEntries inside Apply.
func (e *Engine) loadEntriesLocked(list []*StreamEntry) error {
	ds, todo := entryDeliveries(list)
	if len(ds) == 0 {
		return nil
	}
	cold, err := e.loadRecent(ds)
	if err == nil && cold {
		err = e.loadStored(ds)
	}
	return loadedEntries(ds, todo, err)
}

func entryDeliveries(list []*StreamEntry) ([]Delivery, []*StreamEntry) {
	var ds []Delivery
	var todo []*StreamEntry
	for _, s := range list {
		if s.topic != 0 && !s.loaded && !s.Deleted {
			d := Delivery{Receipt: Receipt{Topic: s.topic, Offset: s.offset}, asFields: true}
			if s.stagedIndex != 0 {
				d.ID = MessageID{Index: s.stagedIndex, Pos: s.stagedPos, Kind: KindDelayed}
			}
			ds = append(ds, d)
			todo = append(todo, s)
		}
	}
	return ds, todo
}

func loadedEntries(ds []Delivery, todo []*StreamEntry, err error) error {
	if err != nil && errs.CodeOf(err) != errs.MessageNotFound {
		return err
	}
	for i, s := range todo {
		s.loaded = true
		if ds[i].Gone {
			s.Deleted = true
			continue
		}
		s.Fields = ds[i].fields
	}
	return nil
}
