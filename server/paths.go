package server

import (
	"fmt"
	"strings"

	"tercet.dev/tercet/internal/errs"
	"tercet.dev/tercet/internal/limits"
)

// adminSegmentsMax bounds the segments of a path below /v1.
const adminSegmentsMax = 7

// adminPath is one path below /v1 and what its methods do.
type adminPath struct {
	pattern  string
	segments []string // behind /v1/
	// allow is the value of the Allow header.
	allow   string
	methods map[string]adminMethod
}

type adminMethod struct {
	access Access
	handle handler
}

// adminPaths is everything below /v1. Paths are found by their segments one after the other: there are few, and none
// of them is asked for often.
type adminPaths []*adminPath

// add adds a method of a path. Two paths that one request could mean are a mistake of the program.
func (p *adminPaths) add(method, pattern string, access Access, h handler) error {
	rest, ok := strings.CutPrefix(pattern, adminPrefix)
	segments := strings.Split(rest, "/")
	if !ok || len(segments) > adminSegmentsMax || rest == "" {
		return fmt.Errorf("route %s %s: want a path below %s of at most %d segments", method, pattern, adminPrefix, adminSegmentsMax)
	}
	var at *adminPath
	for _, known := range *p {
		switch {
		case known.pattern == pattern:
			at = known
		case overlap(known.segments, segments):
			return fmt.Errorf("route %s %s: %s stands for the same requests", method, pattern, known.pattern)
		}
	}
	if at == nil {
		at = &adminPath{pattern: pattern, segments: segments, methods: make(map[string]adminMethod)}
		*p = append(*p, at)
	}
	names := []string{method}
	if method == "GET" {
		names = append(names, "HEAD")
	}
	for _, m := range names {
		if _, ok := at.methods[m]; ok {
			return fmt.Errorf("route %s %s stands twice", m, pattern)
		}
		at.methods[m] = adminMethod{access, h}
		if at.allow != "" {
			at.allow += ", "
		}
		at.allow += m
	}
	return nil
}

func variable(segment string) bool { return strings.HasPrefix(segment, "{") }

// overlap reports whether some path fits both. A word is found before a variable, so only words that differ tell two
// paths apart.
func overlap(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i] != b[i] && !variable(a[i]) && !variable(b[i]) {
			return false
		}
	}
	return true
}

// find returns the path that the segments fit.
func (p adminPaths) find(segments []string) *adminPath {
next:
	for _, path := range p {
		if len(path.segments) != len(segments) {
			continue
		}
		for i, s := range path.segments {
			if s != segments[i] && !variable(s) {
				continue next
			}
		}
		return path
	}
	return nil
}

// routeAdmin routes below /v1/. A topic here may be any key of the Valkey front end, percent-encoded.
func (x *exchange) routeAdmin(rest string, escaped bool) (handler, Access, *errs.Error) {
	var seg [adminSegmentsMax]string
	n := segments(rest, escaped, seg[:])
	var path *adminPath
	if n > 0 {
		path = x.s.paths.find(seg[:n])
	}
	if path == nil {
		x.op = opOther
		return nil, 0, errs.Of(errs.NotFound)
	}
	x.op, x.path = opAdmin, path
	m, ok := path.methods[x.r.Method]
	if !ok {
		x.allow = path.allow
		return nil, 0, errs.New(errs.MethodNotAllowed, "the path takes %s", path.allow)
	}
	for i, s := range path.segments {
		if !variable(s) {
			continue
		}
		x.params = append(x.params, seg[i])
		switch s {
		case "{topic}":
			x.topic = seg[i]
			if len(x.topic) == 0 || len(x.topic) > limits.KeyBytesMax {
				return nil, 0, errs.New(errs.InvalidName, "a topic's name has 1 to %d bytes", limits.KeyBytesMax)
			}
		case "{group}":
			x.group = seg[i]
			if len(x.group) == 0 || len(x.group) > limits.KeyBytesMax {
				return nil, 0, errs.New(errs.InvalidName, "a consumer group's name has 1 to %d bytes", limits.KeyBytesMax)
			}
		}
	}
	return m.handle, m.access, nil
}

// param returns a variable of the path, decoded; the empty string when the path has none of that name.
func (x *exchange) param(name string) string {
	if x.path == nil {
		return ""
	}
	i := 0
	for _, s := range x.path.segments {
		if !variable(s) {
			continue
		}
		if s[1:len(s)-1] == name {
			return x.params[i]
		}
		i++
	}
	return ""
}
