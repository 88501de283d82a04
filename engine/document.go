package engine

import (
	"encoding/binary"
	"slices"
	"sort"
	"unicode/utf8"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// document is one value of a table. Documents are memory over the last checkpoint, as all state that changes.
type document struct {
	value    []byte
	revision uint64
	dirty    bool
}

// documentTable holds the documents of one table.
type documentTable struct {
	docs map[string]*document
}

// documentName is a document's place.
type documentName struct{ table, key string }

// validName reports whether a name may be that of a table or, longer, of a document.
func validName(name []byte, limit int) bool {
	return len(name) > 0 && len(name) <= limit && utf8.Valid(name) && !slices.Contains(name, 0)
}

func (e *Engine) applyDocument(r *reader, res *Result) {
	f := r.flags(2)
	ifAbsent, remove := f&1 != 0, f&2 != 0
	table, key, revision, value := r.bytes(), r.bytes(), r.uvarint(), r.bytes()
	switch {
	case r.err() != nil || remove && (ifAbsent || len(value) > 0):
		res.Code = errs.BadRequest
		return
	case !validName(table, limits.DocumentTableBytesMax) || !validName(key, limits.DocumentKeyBytesMax):
		res.Code = errs.InvalidName
		return
	case len(value) > limits.DocumentBytesMax:
		res.Code = errs.MessageTooLarge
		return
	}
	t := e.documents[string(table)]
	var d *document
	if t != nil {
		d = t.docs[string(key)]
	}
	switch {
	case d == nil && remove:
		res.Code = errs.NotFound
		return
	case d == nil && revision != 0, d != nil && (ifAbsent || revision != 0 && revision != d.revision):
		res.Code = errs.Conflict
		return
	case d == nil && t != nil && len(t.docs) >= limits.DocumentsPerTableMax, t == nil && len(e.documents) >= limits.DocumentTablesMax:
		res.Code = errs.Overloaded
		return
	}
	if remove {
		delete(t.docs, string(key))
		e.removedDocuments = append(e.removedDocuments, documentName{string(table), string(key)})
		if len(t.docs) == 0 {
			delete(e.documents, string(table))
		}
	} else {
		if t == nil {
			t = &documentTable{docs: make(map[string]*document)}
			e.documents[string(table)] = t
		}
		// The value outlives the entry it came in, which may be large.
		t.docs[string(key)] = &document{value: slices.Clone(value), revision: e.index, dirty: true}
		res.Revision = e.index
	}
	e.dirtRough.Add(int64(len(key) + len(value) + 64))
	if e.fx != nil && !slices.Contains(e.fx.Documents, string(table)) {
		e.fx.Documents = append(e.fx.Documents, string(table))
	}
}

func (d *document) appendRow(b []byte) []byte {
	b = append(b, rowVersion, 0)
	b = binary.AppendUvarint(b, d.revision)
	return append(b, d.value...)
}

func parseDocument(row []byte) (*document, error) {
	r := reader{b: row}
	if v := r.u8(); v != rowVersion {
		return nil, rowError(rowDocument, v)
	}
	r.upTo(0)
	d := &document{revision: r.uvarint()}
	if r.bad || len(r.b) > limits.DocumentBytesMax {
		return nil, errMalformed
	}
	d.value = slices.Clone(r.b)
	return d, nil
}

// documentKey is the row's key: the table ends with a zero byte, which no name contains.
func (k keyspace) documentKey(table, key string) []byte {
	b := append(k.key(rowDocument), table...)
	return append(append(b, 0), key...)
}

func splitDocumentKey(row []byte) (table, key string, ok bool) {
	rest := row[min(3, len(row)):]
	i := slices.Index(rest, 0)
	if i <= 0 || i+1 == len(rest) {
		return "", "", false
	}
	return string(rest[:i]), string(rest[i+1:]), true
}

// loadDocument takes a stored row into memory.
func (e *Engine) loadDocument(rowKey, row []byte) error {
	table, key, ok := splitDocumentKey(rowKey)
	if !ok {
		return errMalformed
	}
	d, err := parseDocument(row)
	if err != nil {
		return err
	}
	t := e.documents[table]
	if t == nil {
		t = &documentTable{docs: make(map[string]*document)}
		e.documents[table] = t
	}
	t.docs[key] = d
	return nil
}

// canonicalDocuments appends the documents in the form that replicas agree upon.
func (e *Engine) canonicalDocuments(b []byte) []byte {
	for _, table := range sortedKeys(e.documents) {
		t := e.documents[table]
		for _, key := range sortedKeys(t.docs) {
			b = appendBytes(b, table)
			b = appendBytes(b, key)
			b = appendBytes(b, t.docs[key].appendRow(nil))
		}
	}
	return append(b, 0)
}

// queryDocuments answers QueryDocuments.
func (e *Engine) queryDocuments(q *Query, limit int) Answer {
	var a Answer
	t := e.documents[q.Table]
	if t == nil {
		return a
	}
	one := func(key string) StoredDocument {
		d := t.docs[key]
		return StoredDocument{Table: q.Table, Key: key, Value: d.value, Revision: d.revision}
	}
	if q.Key != "" {
		if t.docs[q.Key] != nil {
			a.Documents = []StoredDocument{one(q.Key)}
		}
		return a
	}
	keys := sortedKeys(t.docs)
	size := 0
	for _, key := range keys[sort.Search(len(keys), func(i int) bool { return keys[i] > q.After }):] {
		if size += len(key) + len(t.docs[key].value); len(a.Documents) == limit || size > answerBytes && len(a.Documents) > 0 {
			a.More = true
			break
		}
		a.Documents = append(a.Documents, one(key))
	}
	return a
}
