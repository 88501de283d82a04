import Link from "next/link";
import "./style.css";

export const metadata = { title: "Contact form", description: "A durable contact form on Tercet" };

export default function Layout({ children }) {
  return (
    <html lang="en">
      <body>
        <header>
          <strong>Contact form</strong>
          <nav>
            <Link href="/">Write</Link>
            <Link href="/review">Review</Link>
            <Link href="/acknowledge">Acknowledge</Link>
          </nav>
        </header>
        <main>{children}</main>
        <footer>A stream and a consumer group on Tercet: what was sent is on the disk of every zone.</footer>
      </body>
    </html>
  );
}
