// Package vercel reads the queue triggers of a vercel.json: which consumer groups there are, and under which paths an
// application answers for them.
package vercel

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"path"
	"slices"
	"strings"
	"unicode/utf16"
)

// Trigger types.
const (
	V2Beta = "queue/v2beta"
	V1Beta = "queue/v1beta"
)

// Consumer is one trigger of one function.
type Consumer struct {
	// File is the function's path as it stands in the project.
	File string
	// Group is the consumer group: derived from the path, or given (v1beta).
	Group string
	// Route is the path under which the application answers.
	Route string
	Type  string
	Topic string
	// Numbers that were not given are nil.
	RetryAfterSeconds, InitialDelaySeconds, MaxConcurrency, MaxDeliveries *int64
}

// config is the part of a vercel.json that matters here. The rest is Vercel's and is passed over.
type config struct {
	Functions orderedFunctions `json:"functions"`
}

type function struct {
	Triggers []trigger `json:"experimentalTriggers"`
}

type trigger struct {
	Type                string   `json:"type"`
	Topic               string   `json:"topic"`
	Consumer            string   `json:"consumer"`
	RetryAfterSeconds   *float64 `json:"retryAfterSeconds"`
	InitialDelaySeconds *float64 `json:"initialDelaySeconds"`
	MaxConcurrency      *float64 `json:"maxConcurrency"`
	MaxDeliveries       *float64 `json:"maxDeliveries"`
}

type namedFunction struct {
	pattern string
	function
}

// orderedFunctions keeps the order of the file: the first pattern that a function fits is its own.
type orderedFunctions []namedFunction

// UnmarshalJSON implements json.Unmarshaler.
func (o *orderedFunctions) UnmarshalJSON(data []byte) error {
	if string(data) == "null" {
		return nil
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return errors.New("functions is not an object")
	}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return err
		}
		f := namedFunction{pattern: t.(string)}
		if err := dec.Decode(&f.function); err != nil {
			return fmt.Errorf("functions: %q: %w", f.pattern, err)
		}
		*o = append(*o, f)
	}
	return nil
}

// Parse reads a vercel.json. Patterns among its functions are matched against the files of the project, which may be
// nil for a project that is not at hand: then only paths without wildcards are understood. All problems are reported
// at once.
func Parse(data []byte, project fs.FS) ([]Consumer, error) {
	var c config
	if err := json.Unmarshal(bytes.TrimPrefix(data, []byte("\ufeff")), &c); err != nil {
		return nil, fmt.Errorf("not a vercel.json: %w", err)
	}
	var out []Consumer
	var problems []error
	taken := map[string]bool{}
	for _, f := range c.Functions {
		if len(queueTriggers(f.Triggers)) == 0 {
			continue
		}
		files, err := expand(f.pattern, project)
		if err != nil {
			problems = append(problems, fmt.Errorf("functions: %q: %w", f.pattern, err))
			continue
		}
		for _, file := range files {
			if taken[file] {
				continue
			}
			taken[file] = true
			cs, err := consumers(file, queueTriggers(f.Triggers))
			if err != nil {
				problems = append(problems, fmt.Errorf("functions: %q: %w", f.pattern, err))
			}
			out = append(out, cs...)
		}
	}
	return out, errors.Join(problems...)
}

// queueTriggers drops what is none of queues' (cron jobs and whatever comes).
func queueTriggers(all []trigger) []trigger {
	var out []trigger
	for _, t := range all {
		if strings.HasPrefix(t.Type, "queue/") {
			out = append(out, t)
		}
	}
	return out
}

func consumers(file string, triggers []trigger) ([]Consumer, error) {
	var out []Consumer
	route, err := Route(file)
	if err != nil {
		return nil, err
	}
	v2 := 0
	for _, t := range triggers {
		c := Consumer{File: file, Route: route, Type: t.Type, Topic: t.Topic}
		switch t.Type {
		case V2Beta:
			if v2++; v2 > 1 {
				return nil, fmt.Errorf("a function has one trigger of type %s; its group's name comes from its path", V2Beta)
			}
			if t.Consumer != "" {
				return nil, fmt.Errorf("consumer belongs to %s; with %s the group's name comes from the function's path", V1Beta, V2Beta)
			}
			c.Group = Group(file)
		case V1Beta:
			if t.Consumer == "" {
				return nil, fmt.Errorf("a trigger of type %s needs a consumer", V1Beta)
			}
			c.Group = t.Consumer
		default:
			return nil, fmt.Errorf("trigger type %q is not known; want %s or %s", t.Type, V2Beta, V1Beta)
		}
		if t.Topic == "" {
			return nil, errors.New("a trigger needs a topic")
		}
		if i := strings.IndexByte(t.Topic, '*'); i >= 0 && i != len(t.Topic)-1 {
			return nil, fmt.Errorf("topic %q: one * at the end is understood, and none elsewhere", t.Topic)
		}
		for _, n := range []struct {
			name  string
			from  *float64
			to    **int64
			least float64
			whole bool
		}{
			{"retryAfterSeconds", t.RetryAfterSeconds, &c.RetryAfterSeconds, math.SmallestNonzeroFloat64, false},
			{"initialDelaySeconds", t.InitialDelaySeconds, &c.InitialDelaySeconds, 0, false},
			{"maxConcurrency", t.MaxConcurrency, &c.MaxConcurrency, 1, true},
			{"maxDeliveries", t.MaxDeliveries, &c.MaxDeliveries, 1, true},
		} {
			if n.from == nil {
				continue
			}
			v := *n.from
			if v < n.least || v > 1<<31-1 || n.whole && v != math.Trunc(v) {
				return nil, fmt.Errorf("%s %v is out of range", n.name, v)
			}
			// Seconds are whole here: never sooner than asked for.
			up := int64(math.Ceil(v))
			*n.to = &up
		}
		out = append(out, c)
	}
	return out, nil
}

// Group derives the name of a consumer group from a function's path, as Vercel does: letters, digits and - stay, _
// doubles, / is _S, . is _D, and anything else its code in hexadecimal.
func Group(file string) string {
	var b strings.Builder
	for _, r := range file {
		switch {
		case r == '_':
			b.WriteString("__")
		case r == '/':
			b.WriteString("_S")
		case r == '.':
			b.WriteString("_D")
		case r >= 'a' && r <= 'z', r >= 'A' && r <= 'Z', r >= '0' && r <= '9', r == '-':
			b.WriteRune(r)
		default:
			// Characters beyond 16 bits count by the first half of their pair, as in JavaScript.
			if r > 0xffff {
				r, _ = utf16.EncodeRune(r)
			}
			fmt.Fprintf(&b, "_%02X", r)
		}
	}
	return b.String()
}

// extensions are those of files that Next.js and Vercel make routes of.
var extensions = []string{".ts", ".tsx", ".js", ".jsx", ".mjs", ".mts", ".cjs", ".cts"}

// Route returns the path under which a function's file is served: app/api/x/route.ts → /api/x, pages/api/x.ts →
// /api/x, api/x.ts → /api/x, each also below src/.
func Route(file string) (string, error) {
	clean := path.Clean("/" + strings.ReplaceAll(file, `\`, "/"))[1:]
	if clean == "." || clean == "" || strings.HasPrefix(file, "../") {
		return "", fmt.Errorf("%q is no path of a function", file)
	}
	ext := path.Ext(clean)
	parts := strings.Split(strings.TrimSuffix(clean, ext), "/")
	if len(parts) > 1 && parts[0] == "src" {
		parts = parts[1:]
	}
	known := slices.Contains(extensions, ext)
	switch kind := parts[0]; {
	case kind == "app" && known:
		last := len(parts) - 1
		if parts[last] != "route" {
			return "", fmt.Errorf("%q is no route: below app/, files named route answer requests", file)
		}
		parts = parts[1:last]
	case kind == "pages" && known && len(parts) > 2 && parts[1] == "api":
		parts = withoutIndex(parts[1:])
	case kind == "pages" && known:
		return "", fmt.Errorf("%q is a page; functions are below pages/api/", file)
	case kind == "api" && len(parts) > 1:
		// Functions of any language.
		parts = withoutIndex(parts)
	default:
		return "", fmt.Errorf("cannot tell which route %q is served under; known are app/**/route.ts, pages/api/**, api/**, each also below src/", file)
	}
	var route strings.Builder
	for _, p := range parts {
		switch {
		case strings.HasPrefix(p, "(.") || strings.HasPrefix(p, "@"):
			return "", fmt.Errorf("%q: a parallel or intercepting route has no path of its own", file)
		case strings.HasPrefix(p, "(") && strings.HasSuffix(p, ")"):
			continue // a route group
		case strings.HasPrefix(p, "[["), strings.HasPrefix(p, "["):
			return "", fmt.Errorf("%q: a dynamic segment (%s) has no single path", file, p)
		case p == "":
			continue
		case strings.HasPrefix(p, "_") && known && !strings.HasPrefix(clean, "pages/") && !strings.HasPrefix(clean, "src/pages/"):
			return "", fmt.Errorf("%q: %s is a private folder, which is not served", file, p)
		}
		route.WriteByte('/')
		route.WriteString(strings.ReplaceAll(p, "%5F", "_"))
	}
	if route.Len() == 0 {
		return "/", nil
	}
	return route.String(), nil
}

// withoutIndex drops a last part that names its folder.
func withoutIndex(parts []string) []string {
	if last := len(parts) - 1; last > 0 && parts[last] == "index" {
		return parts[:last]
	}
	return parts
}

// expand returns the files that a key of functions stands for.
func expand(pattern string, project fs.FS) ([]string, error) {
	if project != nil {
		// [id] is a folder in Next.js before it is a class of characters.
		if info, err := fs.Stat(project, strings.TrimPrefix(path.Clean("/"+pattern), "/")); err == nil && !info.IsDir() {
			return []string{pattern}, nil
		}
	}
	if !strings.ContainsAny(pattern, "*?{") {
		return []string{pattern}, nil
	}
	if project == nil {
		return nil, errors.New("a pattern needs the project's files to be matched against")
	}
	var files []string
	err := fs.WalkDir(project, ".", func(p string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "node_modules" || p != "." && strings.HasPrefix(d.Name(), ".")):
			return fs.SkipDir
		case !d.IsDir() && matchAny(pattern, p):
			files = append(files, p)
		case !d.IsDir() && strings.HasPrefix(p, "src/") && matchAny(pattern, strings.TrimPrefix(p, "src/")):
			files = append(files, p)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, errors.New("no file of the project matches the pattern")
	}
	return files, nil
}

// alternativesMax bounds what braces in a pattern multiply to.
const alternativesMax = 1000

// matchAny matches a pattern with {a,b} in it.
func matchAny(pattern, name string) bool {
	for _, p := range braces(pattern) {
		if matchParts(strings.Split(p, "/"), strings.Split(name, "/")) {
			return true
		}
	}
	return false
}

// braces lists what the alternatives of a pattern multiply to.
func braces(pattern string) []string {
	out := []string{""}
	for pattern != "" {
		open := strings.IndexByte(pattern, '{')
		end := strings.IndexByte(pattern, '}')
		if open < 0 || end < open {
			for i := range out {
				out[i] += pattern
			}
			return out
		}
		var next []string
		for _, alternative := range strings.Split(pattern[open+1:end], ",") {
			for _, o := range out {
				if len(next) == alternativesMax {
					return next
				}
				next = append(next, o+pattern[:open]+alternative)
			}
		}
		out, pattern = next, pattern[end+1:]
	}
	return out
}

// matchParts matches path segments; ** stands for any number of them.
func matchParts(pattern, name []string) bool {
	for len(pattern) > 0 {
		if pattern[0] == "**" {
			for len(pattern) > 1 && pattern[1] == "**" {
				pattern = pattern[1:]
			}
			for i := 0; i <= len(name); i++ {
				if matchParts(pattern[1:], name[i:]) {
					return true
				}
			}
			return false
		}
		if len(name) == 0 {
			return false
		}
		if ok, err := path.Match(pattern[0], name[0]); err != nil || !ok {
			return false
		}
		pattern, name = pattern[1:], name[1:]
	}
	return len(name) == 0
}
