package limits

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/constant"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"os"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "rewrite the table in docs/limits.md")

const page = "../../docs/limits.md"

// TestPage keeps docs/limits.md equal to this package: every constant with its value and its comment.
func TestPage(t *testing.T) {
	fset := token.NewFileSet()
	file, err := parser.ParseFile(fset, "limits.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	pkg, err := (&types.Config{Importer: importer.ForCompiler(fset, "source", nil)}).Check("limits", fset, []*ast.File{file}, nil)
	if err != nil {
		t.Fatal(err)
	}
	var table bytes.Buffer
	table.WriteString("| constant | value | what it bounds |\n| --- | --- | --- |\n")
	for _, decl := range file.Decls {
		g, ok := decl.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			name := v.Names[0].Name
			c := pkg.Scope().Lookup(name).(*types.Const)
			fmt.Fprintf(&table, "| `%s` | %s | %s |\n", name, value(t, c), sentence(name, v.Doc.Text()))
			if v.Doc.Text() == "" {
				t.Errorf("%s has no comment of its own", name)
			}
		}
	}
	old, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok1 := bytes.Cut(old, []byte("<!-- limits -->\n"))
	_, after, ok2 := bytes.Cut(rest, []byte("<!-- end -->\n"))
	if !ok1 || !ok2 {
		t.Fatal("docs/limits.md has lost its markers")
	}
	want := bytes.Join([][]byte{before, []byte("<!-- limits -->\n"), table.Bytes(), []byte("<!-- end -->\n"), after}, nil)
	if *update {
		if err := os.WriteFile(page, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if !bytes.Equal(old, want) {
		t.Errorf("docs/limits.md is not this package: go test ./internal/limits -update")
	}
}

// value writes a constant the way people read it.
func value(t *testing.T, c *types.Const) string {
	n, exact := constant.Int64Val(c.Val())
	if !exact {
		t.Fatalf("%s is no whole number", c.Name())
	}
	if c.Type().String() == "time.Duration" {
		d := time.Duration(n)
		if d >= 48*time.Hour {
			return fmt.Sprintf("%d days", d/(24*time.Hour))
		}
		s := d.String()
		if strings.HasSuffix(s, "m0s") {
			s = strings.TrimSuffix(s, "0s")
		}
		if strings.HasSuffix(s, "h0m") {
			s = strings.TrimSuffix(s, "0m")
		}
		return s
	}
	if strings.Contains(c.Name(), "Bytes") {
		switch {
		case n >= 1<<20 && n%(1<<20) == 0:
			return fmt.Sprintf("%d MiB", n>>20)
		case n >= 1<<10 && n%(1<<10) == 0:
			return fmt.Sprintf("%d KiB", n>>10)
		}
		return fmt.Sprintf("%d bytes", n)
	}
	return fmt.Sprint(n)
}

// sentence is a doc comment without the name it begins with, on one line.
func sentence(name, doc string) string {
	s := strings.Join(strings.Fields(doc), " ")
	s = strings.TrimPrefix(s, name+" ")
	return strings.TrimPrefix(s, "is ")
}
