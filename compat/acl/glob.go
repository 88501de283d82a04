package acl

// globSteps bounds the work of one match. A pattern that needs more matches nothing: it was made to cost time.
const globSteps = 1 << 20

// Match reports whether s matches a pattern of Valkey's kind: * for any bytes, ? for one, [abc], [^a-z], and \ before
// a byte that is meant literally.
func Match(pattern, s string) bool {
	p, i := 0, 0
	// The last * seen, and where its match ends at present.
	star, mark := -1, 0
	for steps := 0; ; steps++ {
		if steps > globSteps {
			return false
		}
		if p < len(pattern) && pattern[p] == '*' {
			star, mark = p, i
			p++
			continue
		}
		if i == len(s) {
			return p == len(pattern)
		}
		if next, ok := matchOne(pattern, p, s[i]); ok {
			p, i = next, i+1
			continue
		}
		if star < 0 {
			return false
		}
		mark++
		p, i = star+1, mark
		if mark > len(s) {
			return false
		}
	}
}

// matchOne matches one byte with what stands at p, and returns where the pattern goes on.
func matchOne(pattern string, p int, c byte) (next int, ok bool) {
	if p >= len(pattern) {
		return 0, false
	}
	switch pattern[p] {
	case '?':
		return p + 1, true
	case '\\':
		if p+1 < len(pattern) {
			p++
		}
		return p + 1, pattern[p] == c
	case '[':
		return matchClass(pattern, p+1, c)
	}
	return p + 1, pattern[p] == c
}

// matchClass matches one byte with the class whose first byte is at p. A class that is not closed ends with the pattern.
func matchClass(pattern string, p int, c byte) (next int, ok bool) {
	not := p < len(pattern) && pattern[p] == '^'
	if not {
		p++
	}
	for p < len(pattern) && pattern[p] != ']' {
		switch {
		case pattern[p] == '\\' && p+1 < len(pattern):
			p++
			ok = ok || pattern[p] == c
		case p+2 < len(pattern) && pattern[p+1] == '-':
			from, to := pattern[p], pattern[p+2]
			if from > to {
				from, to = to, from
			}
			ok = ok || c >= from && c <= to
			p += 2
		default:
			ok = ok || pattern[p] == c
		}
		p++
	}
	if p < len(pattern) {
		p++
	}
	return p, ok != not
}
