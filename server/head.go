package server

import "bytes"

// headLineMax is how much of a line is kept when it comes in pieces: enough to know the two names that matter and
// whether it ends in CR LF.
const headLineMax = 64

// look takes the next bytes of the connection and reports whether the head is still unambiguous.
func (c *headConn) look(p []byte) bool {
	for c.inHead {
		end := bytes.IndexByte(p, '\n')
		if end < 0 {
			c.keep(p)
			return true
		}
		line := p[:end]
		if len(c.line) > 0 {
			c.keep(line)
			line = c.line
		}
		p = p[end+1:]
		if !c.endOfLine(line) {
			return false
		}
		c.line = c.line[:0]
	}
	return true
}

// keep remembers the beginning of an unfinished line, and always its last byte.
func (c *headConn) keep(p []byte) {
	if len(p) == 0 {
		return
	}
	room := headLineMax - len(c.line)
	if len(p) <= room {
		c.line = append(c.line, p...)
		return
	}
	if room > 0 {
		c.line = append(c.line, p[:room]...)
	}
	c.line[len(c.line)-1] = p[len(p)-1]
}

// endOfLine judges a line without its LF.
func (c *headConn) endOfLine(line []byte) bool {
	if len(line) == 0 || line[len(line)-1] != '\r' {
		return false
	}
	line = line[:len(line)-1]
	if !c.first {
		// The request line. Empty lines before it are allowed and skipped.
		c.first = len(line) > 0
		if bytes.Equal(line, []byte("PRI * HTTP/2.0")) {
			c.frames, c.inHead = true, false
		}
		return true
	}
	if len(line) == 0 {
		c.inHead = false
		return true
	}
	switch line[0] {
	case ' ', '\t':
		return false
	case 'c', 'C':
		c.hasLength = c.hasLength || namesHeader(line, "content-length")
	case 't', 'T':
		c.hasCoded = c.hasCoded || namesHeader(line, "transfer-encoding")
	}
	return !c.hasLength || !c.hasCoded
}

// namesHeader reports whether the line is the header of that name.
func namesHeader(line []byte, name string) bool {
	if len(line) < len(name)+1 || line[len(name)] != ':' {
		return false
	}
	return bytes.EqualFold(line[:len(name)], []byte(name))
}
